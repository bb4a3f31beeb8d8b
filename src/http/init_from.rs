//! The adapter that a job starts from: a result file of another job.

use std::{path::PathBuf, sync::Arc};

use lorad_proto::problem::FieldError;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    body::Fields,
    error::{ApiError, ApiResult, Code},
};
use crate::{
    app::App,
    domain::{ArtifactKind, InitFrom, JobId, Model},
};

/// A result file to start from; its modules, ranks and alphas become the job's. The job that made it cannot be deleted before
/// this one has ended.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = InitFrom)]
pub(super) struct InitFromDto {
    /// The job that made it.
    pub job_id: String,
    /// The diffusers or kohya file, or the PEFT archive: a name of `GET /jobs/{id}/files`.
    pub file: String,
}

impl From<InitFrom> for InitFromDto {
    fn from(init: InitFrom) -> Self {
        Self {
            job_id: init.job_id.to_string(),
            file: init.file,
        }
    }
}

/// Reads the field and finds the file.
pub(super) async fn find(
    app: &App,
    object: Option<Map<String, Value>>,
    errors: &mut Vec<FieldError>,
) -> ApiResult<Option<PathBuf>> {
    let Some(object) = object else { return Ok(None) };
    let mut fields = Fields::of(Value::Object(object), "/init_from", errors);
    let (job, file) = (fields.required_string("job_id"), fields.required_string("file"));
    let (Some(job), Some(file)) = (job, file) else {
        fields.finish();
        return Ok(None);
    };
    let files = match job.parse::<JobId>() {
        Ok(id) => app.store.artifacts(id).await?,
        Err(_) => Vec::new(),
    };
    let is_adapter = |kind| matches!(kind, ArtifactKind::Diffusers | ArtifactKind::Kohya | ArtifactKind::Peft);
    let adapters: Vec<_> = files.into_iter().filter(|a| is_adapter(a.kind)).collect();
    let found = adapters.iter().find(|a| a.name == file);
    let path = found.map(|a| app.data.artifacts().join(a.job_id.to_string()).join(&a.name));
    if adapters.is_empty() {
        let shown: String = job.chars().take(80).collect();
        fields.fault(
            "job_id",
            "unknown_value",
            format!("there is no job {shown:?} with an adapter"),
        );
    } else if path.is_none() {
        let names: Vec<&str> = adapters.iter().map(|a| a.name.as_str()).collect();
        let detail = format!("it is none of the job's adapters; those are {}", names.join(", "));
        fields.fault("file", "unknown_value", detail);
    }
    fields.finish();
    Ok(path)
}

/// Puts what the file decides into resolved hyperparameters.
pub(super) async fn adopt(
    app: &App,
    model: &Model,
    file: PathBuf,
    given: Map<String, Value>,
    mut hyperparameters: Map<String, Value>,
) -> ApiResult<Map<String, Value>> {
    let (catalog, family, path) = (Arc::clone(&app.catalog), model.info.family.clone(), model.path.clone());
    let adopted = tokio::task::spawn_blocking(move || {
        catalog
            .adopt_adapter(&family, &path, &file, &given, &mut hyperparameters)
            .map(|()| hyperparameters)
    });
    adopted
        .await
        .map_err(ApiError::internal)?
        .map_err(|problem| ApiError::with_problem(Code::InvalidRequest, problem))
}
