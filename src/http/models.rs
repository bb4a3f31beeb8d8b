//! Base models: list, register a folder under the allowed roots, forget.

use std::{
    path::{Path as FsPath, PathBuf},
    sync::Arc,
};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use lorad_proto::catalog::Catalog;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    body::{self, Fields},
    dto::{List, model_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::{
    app::App,
    domain::{Model, ModelId, ModelKind, now_ms},
};

/// A model.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Model)]
pub(super) struct ModelDto {
    /// Its slug.
    pub id: String,
    /// `base` or `adapter`.
    pub kind: &'static str,
    /// Family that trains it.
    pub family: String,
    /// Size of all weight files.
    pub bytes: u64,
    /// Native picture side, pixels.
    pub resolution: u32,
    /// `epsilon` or `v_prediction`.
    pub prediction_type: String,
    /// Figures: channels, layers, parameters, …
    #[schema(value_type = Object)]
    pub details: Map<String, Value>,
    /// `bundled`, `folder`, `job:<id>`.
    pub source: String,
    /// Licence note.
    pub licence: String,
    /// Whether it comes with the server.
    pub builtin: bool,
    /// When it was registered.
    pub created_at: String,
}

impl From<&Model> for ModelDto {
    fn from(model: &Model) -> Self {
        Self {
            id: model.id.to_string(),
            kind: model.kind.as_str(),
            family: model.info.family.clone(),
            bytes: model.info.bytes,
            resolution: model.info.resolution,
            prediction_type: model.info.prediction_type.clone(),
            details: model.info.details.clone(),
            source: model.source.clone(),
            licence: model.licence.clone(),
            builtin: model.builtin,
            created_at: rfc3339(model.created_at_ms),
        }
    }
}

/// Lists models in order of their ids.
#[utoipa::path(get, path = "/models", tag = "models", responses((status = 200, body = List<ModelDto>)))]
pub(super) async fn list_models(State(app): State<App>) -> ApiResult<Json<List<ModelDto>>> {
    let models = app.store.models().await?;
    Ok(Json(List::complete(models.iter().map(ModelDto::from).collect())))
}

/// Reads a model.
#[utoipa::path(get, path = "/models/{id}", tag = "models", params(("id" = String, Path, description = "its slug")), responses(
    (status = 200, body = ModelDto), (status = 404, body = ProblemDto)))]
pub(super) async fn get_model(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<ModelDto>> {
    let model = app.store.model(&model_id(&id)?).await?;
    Ok(Json((&model).into()))
}

/// A folder to register.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ModelRequest)]
pub(super) struct ModelRequestDto {
    /// A slug: 1 to 64 of `a-z 0-9 . _ -`.
    pub id: String,
    /// Absolute path on the server, under one of `models.roots`: a diffusers folder, or a checkpoint in one .safetensors
    /// file in the original naming, with `tokenizer/` beside it.
    pub path: String,
    /// Licence note, for people.
    pub licence: Option<String>,
}

/// Registers a base model that lies on the server.
#[utoipa::path(post, path = "/models", tag = "models", request_body = ModelRequestDto, responses(
    (status = 201, body = ModelDto, headers(("Location" = String))), (status = 403, body = ProblemDto, description = "outside the allowed roots"),
    (status = 409, body = ProblemDto, description = "the id is taken"), (status = 422, body = ProblemDto, description = "names file, key and shape that do not fit")))]
pub(super) async fn register_model(State(app): State<App>, headers: HeaderMap, body: Body) -> ApiResult<Response> {
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let id = fields.required_string("id").map(|text| text.parse::<ModelId>());
    if let Some(Err(error)) = &id {
        fields.fault("id", "invalid_characters", error.to_string());
    }
    let path = fields.required_string("path").map(PathBuf::from);
    if path.as_deref().is_some_and(|path| !path.is_absolute()) {
        fields.fault("path", "invalid_value", "must be an absolute path on the server");
    }
    let licence = fields.label("licence", 200).unwrap_or_default();
    fields.finish();
    let (Some(Ok(id)), Some(path), true) = (id, path, errors.is_empty()) else {
        return Err(ApiError::fields(errors));
    };
    let given = within_roots(&path, &app.config.models.roots)?;
    let catalog = Arc::clone(&app.catalog);
    let (models, slug) = (app.data.models(), id.to_string());
    let found = tokio::task::spawn_blocking(move || {
        let path = if given.is_file() {
            import(&*catalog, &given, &models, &slug)?
        } else {
            given
        };
        let info = catalog.inspect_base(&path);
        info.map(|info| (path, info))
            .map_err(|problem| ApiError::with_problem(Code::BaseModelUnfit, problem))
    });
    let (path, info) = found.await.map_err(ApiError::internal)??;
    let model = Model {
        id,
        kind: ModelKind::Base,
        path,
        source: "folder".to_owned(),
        licence,
        builtin: false,
        info,
        created_at_ms: now_ms(),
    };
    app.store.insert_model(&model).await?;
    let location = [(header::LOCATION, format!("/models/{}", model.id))];
    Ok((StatusCode::CREATED, location, Json(ModelDto::from(&model))).into_response())
}

/// Makes a folder under `models` for a checkpoint in one file, whose weights stay where they are.
fn import(catalog: &dyn Catalog, file: &FsPath, models: &FsPath, slug: &str) -> ApiResult<PathBuf> {
    std::fs::create_dir_all(models).map_err(ApiError::internal)?;
    let fresh = tempfile::Builder::new()
        .prefix(".import-")
        .tempdir_in(models)
        .map_err(ApiError::internal)?;
    catalog
        .import_single_file(file, fresh.path())
        .map_err(|problem| ApiError::with_problem(Code::BaseModelUnfit, problem))?;
    // A name that no bundled or earlier model's folder has.
    let dir = models.join(format!("{slug}-{}", uuid::Uuid::now_v7().simple()));
    std::fs::rename(fresh.keep(), &dir).map_err(ApiError::internal)?;
    Ok(dir)
}

/// The real path, if it lies under a root. A folder outside and a folder that is not there get the same answer, so that
/// nothing is learnt about the server's disk.
fn within_roots(path: &FsPath, roots: &[PathBuf]) -> ApiResult<PathBuf> {
    let real = path.canonicalize().ok().filter(|real| real.is_dir() || real.is_file());
    let roots: Vec<PathBuf> = roots.iter().filter_map(|root| root.canonicalize().ok()).collect();
    real.filter(|real| roots.iter().any(|root| real.starts_with(root)))
        .ok_or_else(|| {
            ApiError::new(
                Code::ModelPathNotAllowed,
                "The folder or file does not exist under an allowed root.",
            )
        })
}

/// Forgets a model that no job uses; its folder stays.
#[utoipa::path(delete, path = "/models/{id}", tag = "models", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto, description = "a job uses it, or it is built in")))]
pub(super) async fn delete_model(State(app): State<App>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let id = model_id(&id)?;
    if app.store.model(&id).await?.builtin {
        return Err(ApiError::new(
            Code::Builtin,
            format!("The model {id} comes with the server."),
        ));
    }
    app.store.delete_model(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
