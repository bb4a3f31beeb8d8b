//! Base models: list, register a folder under the allowed roots, download from a hub, forget.

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
use lorad_proto::{
    catalog::Catalog,
    problem::{FieldError, Problem},
};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    body::{self, Fields},
    dto::{List, model_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::{
    app::{App, remove_dir},
    domain::{
        Model, ModelId, ModelKind,
        download::{Download, DownloadStatus},
        id::IdError,
        now_ms,
    },
    downloads,
    hub::{self, Hub, HubId},
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
    /// `bundled`, `folder`, `job:<id>`, `hub:<owner>/<name>@<commit>`.
    pub source: String,
    /// `ready`; `downloading` and `failed` while it comes from a hub: then family and figures are not known yet.
    pub status: &'static str,
    /// How far it has come from the hub, until it is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub download: Option<DownloadDto>,
    /// Licence note.
    pub licence: String,
    /// Whether it comes with the server.
    pub builtin: bool,
    /// When it was registered.
    pub created_at: String,
}

/// A download from a hub.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ModelDownload)]
pub(super) struct DownloadDto {
    /// `owner/name@revision`, as asked.
    pub hub_id: String,
    /// The commit that the revision was then; this is what is downloaded.
    pub commit: String,
    /// Bytes that are here.
    pub done_bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Why it stopped. The same request again goes on from here.
    #[schema(value_type = Option<ProblemDto>)]
    pub error: Option<Problem>,
}

impl ModelDto {
    fn downloading(app: &App, download: &Download) -> Self {
        Self {
            id: download.id.to_string(),
            kind: ModelKind::Base.as_str(),
            family: String::new(),
            bytes: download.total_bytes,
            resolution: 0,
            prediction_type: String::new(),
            details: Map::new(),
            source: download.source(),
            status: download.status.as_str(),
            download: Some(DownloadDto {
                hub_id: format!("{}@{}", download.repository, download.revision),
                commit: download.commit.clone(),
                done_bytes: app.downloads.done_bytes(&download.id).unwrap_or(0),
                total_bytes: download.total_bytes,
                error: download.error.clone(),
            }),
            licence: download.licence.clone(),
            builtin: false,
            created_at: rfc3339(download.created_at_ms),
        }
    }
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
            status: "ready",
            download: None,
            licence: model.licence.clone(),
            builtin: model.builtin,
            created_at: rfc3339(model.created_at_ms),
        }
    }
}

/// Lists models in order of their ids.
#[utoipa::path(get, path = "/models", tag = "models", responses((status = 200, body = List<ModelDto>)))]
pub(super) async fn list_models(State(app): State<App>) -> ApiResult<Json<List<ModelDto>>> {
    let (downloads, models) = (app.store.downloads().await?, app.store.models().await?);
    let mut all: Vec<ModelDto> = models.iter().map(ModelDto::from).collect();
    all.extend(downloads.iter().map(|download| ModelDto::downloading(&app, download)));
    all.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(Json(List::complete(all)))
}

/// Reads a model.
#[utoipa::path(get, path = "/models/{id}", tag = "models", params(("id" = String, Path, description = "its slug")), responses(
    (status = 200, body = ModelDto), (status = 404, body = ProblemDto)))]
pub(super) async fn get_model(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<ModelDto>> {
    let id = model_id(&id)?;
    if let Some(download) = app.store.download(&id).await? {
        return Ok(Json(ModelDto::downloading(&app, &download)));
    }
    Ok(Json((&app.store.model(&id).await?).into()))
}

/// A folder to register, or a model to download.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ModelRequest)]
pub(super) struct ModelRequestDto {
    /// A slug: 1 to 64 of `a-z 0-9 . _ -`. With `hub_id` it may be left out: then it is the model's name there.
    pub id: Option<String>,
    /// Absolute path on the server, under one of `models.roots`: a diffusers folder, or a checkpoint in one .safetensors
    /// file in the original naming, with `tokenizer/` beside it. This or `hub_id`.
    pub path: Option<String>,
    /// `owner/name` or `owner/name@revision` of a hub, to be downloaded; see `models.hub_endpoint`.
    pub hub_id: Option<String>,
    /// Licence note, for people.
    pub licence: Option<String>,
}

/// Registers a base model that lies on the server, or downloads one from a hub.
#[utoipa::path(post, path = "/models", tag = "models", request_body = ModelRequestDto, responses(
    (status = 201, body = ModelDto, headers(("Location" = String))),
    (status = 202, body = ModelDto, headers(("Location" = String)), description = "being downloaded: `GET` it for its progress"),
    (status = 502, body = ProblemDto, description = "the hub cannot be reached"), (status = 403, body = ProblemDto, description = "outside the allowed roots"),
    (status = 409, body = ProblemDto, description = "the id is taken"), (status = 422, body = ProblemDto, description = "names file, key and shape that do not fit")))]
pub(super) async fn register_model(State(app): State<App>, headers: HeaderMap, body: Body) -> ApiResult<Response> {
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let hub_id = fields.string("hub_id").map(|text| text.parse::<HubId>());
    if let Some(Err(error)) = &hub_id {
        fields.fault("hub_id", "invalid_value", error.clone());
    }
    if let Some(hub_id) = hub_id {
        let id = fields.string("id").map(|text| text.parse::<ModelId>());
        if let Some(Err(error)) = &id {
            fields.fault("id", "invalid_characters", error.to_string());
        }
        let licence = fields.label("licence", 200);
        fields.finish();
        let (Ok(hub_id), true) = (hub_id, errors.is_empty()) else {
            return Err(ApiError::fields(errors));
        };
        return download(&app, id.and_then(Result::ok), &hub_id, licence).await;
    }
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

/// Asks the hub what the model is now, and starts to download that.
async fn download(app: &App, id: Option<ModelId>, hub_id: &HubId, licence: Option<String>) -> ApiResult<Response> {
    let refused = |problem: Problem| {
        let code = if problem.code == "hub.unreachable" {
            Code::HubUnreachable
        } else {
            Code::HubRefused
        };
        ApiError::with_problem(code, problem)
    };
    let id = match id {
        Some(id) => id,
        None => hub_id.slug().parse().map_err(|error: IdError| {
            ApiError::fields(vec![FieldError::new(
                "/id",
                "required",
                format!("the hub's name makes no id ({error}); give one"),
            )])
        })?,
    };
    let hub = Hub::new(&app.config.models.hub_endpoint).map_err(refused)?;
    let snapshot = hub.snapshot(hub_id).await.map_err(refused)?;
    let files = hub::choose(&snapshot).map_err(refused)?;
    let total_bytes = files.iter().map(|file| file.bytes).sum();
    body::require_room(app, total_bytes)?;
    let download = Download {
        id,
        repository: snapshot.repository,
        revision: hub_id.revision.clone(),
        commit: snapshot.commit,
        licence: licence.unwrap_or(snapshot.licence),
        status: DownloadStatus::Downloading,
        total_bytes,
        error: None,
        created_at_ms: now_ms(),
    };
    app.store.insert_download(&download).await?;
    downloads::start(app, download.clone());
    let location = [(header::LOCATION, format!("/models/{}", download.id))];
    Ok((
        StatusCode::ACCEPTED,
        location,
        Json(ModelDto::downloading(app, &download)),
    )
        .into_response())
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

/// Forgets a model that no job uses; its folder stays, unless it was downloaded. Cancels a download.
#[utoipa::path(delete, path = "/models/{id}", tag = "models", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto, description = "a job uses it, or it is built in")))]
pub(super) async fn delete_model(State(app): State<App>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let id = model_id(&id)?;
    if downloads::cancel(&app, &id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let model = app.store.model(&id).await?;
    if model.builtin {
        return Err(ApiError::new(
            Code::Builtin,
            format!("The model {id} comes with the server."),
        ));
    }
    app.store.delete_model(&id).await?;
    if model.source.starts_with("hub:") && model.path.starts_with(app.data.models()) {
        remove_dir(model.path).await;
    }
    Ok(StatusCode::NO_CONTENT)
}
