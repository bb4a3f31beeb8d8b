//! Submitting jobs: one request does it all. Validation names every field at fault at once; an `Idempotency-Key` makes
//! a repeat safe.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::{FromRequest as _, Multipart, Path, Query, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use lorad_proto::{
    catalog::Plan,
    problem::FieldError,
    spec::{Export, Sampling},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use utoipa::{IntoParams, ToSchema};

use super::{
    access::Caller,
    body::{self, Fields, Upload},
    datasets,
    dto::job_id,
    error::{ApiError, ApiResult, Code, ProblemDto},
    init_from::{self, InitFromDto},
    jobs::{DatasetRefDto, ExportDto, JobDto, PlanDto, SamplingDto, notes},
    webhooks::{self, WebhookRequestDto},
};
use crate::{
    app::App,
    domain::{Action, Dataset, Job, JobId, JobStatus, KeyId, Model, ModelId, ModelKind, NewJob, estimate},
    ingest::library,
    store::{Begin, IdempotencyKey, StoreError, StoredAnswer},
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
static DEMO: &str = include_str!("../../configs/demo.json");

/// A job to run. For the hyperparameters of a family see `GET /families/{id}/schema`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = JobRequest)]
pub(super) struct JobRequestDto {
    /// 1 to 200 characters.
    pub name: String,
    /// Id of a base model, see `GET /models`.
    pub base_model: String,
    /// Id of a dataset; left out when the request brings its own archive.
    pub dataset_id: Option<String>,
    /// Left out ones get the family's defaults.
    #[schema(value_type = Option<Object>)]
    pub hyperparameters: Option<Map<String, Value>>,
    /// An adapter to start from.
    pub init_from: Option<InitFromDto>,
    /// Sample pictures before, during and after training.
    pub sampling: Option<SamplingDto>,
    /// Extra results.
    pub export: Option<ExportDto>,
    /// At most 32, each at most 64 characters.
    pub tags: Option<Vec<String>>,
    /// At most 10 000 characters.
    pub notes: Option<String>,
    /// -1000 to 1000; higher starts first.
    pub priority: Option<i64>,
    /// Who is told what becomes of the job; see also `POST /webhooks`.
    pub webhook: Option<WebhookRequestDto>,
}

/// A job and its dataset in one request.
#[derive(Debug, ToSchema)]
#[schema(as = JobForm)]
#[expect(dead_code, reason = "only documents the form")]
pub(super) struct JobFormDto {
    /// JSON.
    job: JobRequestDto,
    /// A zip, tar or tar.gz of pictures with captions.
    #[schema(value_type = String, format = Binary)]
    dataset: Vec<u8>,
}

/// A job as it would run.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DryRun)]
pub(super) struct DryRunDto {
    /// Always true: errors are answered as such.
    pub valid: bool,
    /// The name.
    pub name: String,
    /// The base.
    pub base_model: String,
    /// The data.
    pub dataset: DatasetRefDto,
    /// The family.
    pub family: String,
    /// Every hyperparameter, defaults filled in.
    #[schema(value_type = Object)]
    pub hyperparameters: Map<String, Value>,
    /// Sample pictures.
    pub sampling: SamplingDto,
    /// Extra results.
    pub export: ExportDto,
    /// Steps, memory, warnings.
    pub plan: PlanDto,
}

/// How to submit.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct SubmitQuery {
    /// Only check the request: nothing is stored.
    dry_run: Option<bool>,
}

/// Submits a job: JSON with a `dataset_id`, or form data with the parts `job` (JSON) and `dataset` (archive).
#[utoipa::path(post, path = "/jobs", tag = "jobs",
    params(SubmitQuery, ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters; the same request under the same key has one effect and one answer, for 24 hours")),
    request_body(content((JobRequestDto = "application/json"), (JobFormDto = "multipart/form-data"))),
    responses(
        (status = 201, body = JobDto, headers(("Location" = String), ("Idempotent-Replayed" = String))),
        (status = 200, body = DryRunDto, description = "dry run"),
        (status = 409, body = ProblemDto, description = "the first request with this key is still at work"),
        (status = 413, body = ProblemDto), (status = 415, body = ProblemDto), (status = 422, body = ProblemDto), (status = 429, body = ProblemDto),
        (status = 507, body = ProblemDto, description = "the disk has no room for the archive")))]
pub(super) async fn create_job(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<SubmitQuery>,
    request: Request,
) -> ApiResult<Response> {
    let headers = request.headers().clone();
    let mut incoming = if body::media_type(&headers) == "multipart/form-data" {
        read_form(&app, request).await?
    } else {
        body::require_json(&headers)?;
        let limit = usize::try_from(app.config.limits.json_bytes).unwrap_or(body::MAX_JSON_BYTES);
        let bytes = body::read_all(request.into_body(), limit).await?;
        Incoming {
            request: body::parse(&bytes)?,
            sha256: hex::encode(Sha256::digest(&bytes)),
            upload: None,
            owner: None,
        }
    };
    incoming.owner = caller.owner();
    let dry_run = query.dry_run.unwrap_or(false);
    let key = idempotency_key(&headers, &incoming)?.filter(|_| !dry_run);
    // In a task of its own: a client that hangs up must not leave a half-done key or dataset behind.
    let work = tokio::spawn(async move {
        match key {
            None => submit(&app, incoming, dry_run, None, None).await,
            Some(key) => once(&app, incoming, key).await,
        }
    });
    work.await.map_err(ApiError::internal)?
}

struct Incoming {
    request: Value,
    /// Of all that makes the request what it is.
    sha256: String,
    upload: Option<Upload>,
    /// Whose job it will be.
    owner: Option<KeyId>,
}

async fn read_form(app: &App, request: Request) -> ApiResult<Incoming> {
    body::require_space(app, request.headers())?;
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|_| ApiError::new(Code::Multipart, "The form data has no boundary."))?;
    let (mut job, mut upload) = (None, None);
    while let Some(field) = form.next_field().await.map_err(body::multipart_error)? {
        match field.name() {
            Some("job") if job.is_none() => job = Some(body::text_part(field, body::MAX_JSON_BYTES).await?),
            Some("dataset") if upload.is_none() => {
                upload = Some(body::upload(field, &app.data.tmp(), app.config.limits.upload_bytes).await?);
            }
            name => {
                let shown: String = name.unwrap_or("").chars().take(80).collect();
                let detail = format!("The part {shown:?} is not known or comes twice; known are job and dataset.");
                return Err(ApiError::new(Code::Multipart, detail));
            }
        }
    }
    let job = job.ok_or_else(|| ApiError::new(Code::Multipart, "The part `job` (JSON) is missing."))?;
    let mut sha256 = Sha256::new();
    sha256.update(&job);
    if let Some(upload) = &upload {
        sha256.update(upload.sha256.as_bytes());
    }
    Ok(Incoming {
        request: body::parse(&job)?,
        sha256: hex::encode(sha256.finalize()),
        upload,
        owner: None,
    })
}

fn idempotency_key(headers: &HeaderMap, incoming: &Incoming) -> ApiResult<Option<IdempotencyKey>> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.len()) => Ok(Some(IdempotencyKey {
            key: key.to_owned(),
            // Nobody gets the answer to another key's request.
            scope: incoming
                .owner
                .map_or("POST /jobs".to_owned(), |owner| format!("POST /jobs {owner}")),
            body_sha256: incoming.sha256.clone(),
        })),
        _ => Err(ApiError::new(
            Code::InvalidHeader,
            "`Idempotency-Key` must have 1 to 255 visible ASCII characters.",
        )),
    }
}

/// Submits under a key: the first request does it, repeats get its answer.
async fn once(app: &App, incoming: Incoming, key: IdempotencyKey) -> ApiResult<Response> {
    match app.store.begin_idempotency(&key).await? {
        Begin::New => {}
        Begin::InFlight => {
            let detail = "A request with this Idempotency-Key is being worked on.";
            return Err(ApiError::new(Code::IdempotencyInFlight, detail).with_retry_after(1));
        }
        Begin::OtherBody => {
            let detail = "This Idempotency-Key was used with another request body.";
            return Err(ApiError::new(Code::IdempotencyOtherBody, detail));
        }
        Begin::Replay(answer) => {
            let mut response = stored_answer(&answer);
            response
                .headers_mut()
                .insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
            return Ok(response);
        }
    }
    let outcome = submit(app, incoming, false, Some(&key), None).await;
    if outcome.is_err() {
        app.give_key_back(key).await;
    }
    outcome
}

fn stored_answer(answer: &StoredAnswer) -> Response {
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::CREATED);
    let mut response = (
        status,
        [(header::CONTENT_TYPE, "application/json")],
        answer.body.clone(),
    )
        .into_response();
    if let Some(location) = answer.location.as_deref().and_then(|l| HeaderValue::from_str(l).ok()) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Checks, then stores (unless dry). What was uploaded is gone again if anything fails.
async fn submit(
    app: &App,
    incoming: Incoming,
    dry_run: bool,
    key: Option<&IdempotencyKey>,
    parent: Option<JobId>,
) -> ApiResult<Response> {
    let uploaded = match &incoming.upload {
        None => None,
        Some(upload) => match datasets::prepare(app, upload, None, "/dataset").await {
            Ok(dataset) => Some(dataset),
            Err(mut refused) => {
                // The rest of the request is checked all the same: all errors come at once.
                let rest = check(app, incoming.request, DatasetOf::Refused, parent).await;
                if let Err(error) = rest {
                    refused = refused.and_fields_of(error);
                }
                return Err(refused);
            }
        },
    };
    let owner = incoming.owner;
    let source = uploaded.as_ref().map_or(DatasetOf::Request, DatasetOf::Upload);
    let outcome = match check(app, incoming.request, source, parent).await {
        Ok(Checked::Complete(draft)) if dry_run => Ok(Json(draft.dry_run()).into_response()),
        Ok(Checked::Complete(mut draft)) => {
            draft.new.owner = owner;
            let job = store(app, &draft, uploaded.is_some(), key).await;
            job.map(|job| stored_answer(&job))
        }
        Ok(Checked::WithoutDataset) => Err(ApiError::internal("a request without dataset passed its checks")),
        Err(error) => Err(error),
    };
    if let Some(dataset) = &uploaded
        && (dry_run || outcome.is_err())
    {
        library::discard(dataset).await;
    }
    outcome
}

/// A request that passed every check.
struct Draft {
    new: NewJob,
    dataset: Dataset,
}

enum Checked {
    Complete(Box<Draft>),
    WithoutDataset,
}

#[derive(Clone, Copy)]
enum DatasetOf<'a> {
    /// `dataset_id` names it.
    Request,
    /// It came along.
    Upload(&'a Dataset),
    /// It came along and was refused; only the rest is checked.
    Refused,
}

impl Draft {
    fn dry_run(&self) -> DryRunDto {
        let new = &self.new;
        DryRunDto {
            valid: true,
            name: new.name.clone(),
            base_model: new.base_model.to_string(),
            dataset: (&self.dataset).into(),
            family: new.family.clone(),
            hyperparameters: new.hyperparameters.clone(),
            sampling: (&new.sampling).into(),
            export: (&new.export).into(),
            plan: (&new.plan).into(),
        }
    }
}

async fn store(app: &App, draft: &Draft, is_new: bool, key: Option<&IdempotencyKey>) -> ApiResult<StoredAnswer> {
    let counts = app.store.job_counts().await?;
    let queued = counts
        .iter()
        .find(|(s, _)| *s == JobStatus::Queued)
        .map_or(0, |(_, n)| *n);
    if queued >= app.config.limits.queued_jobs {
        let detail = format!("{queued} jobs wait already.");
        return Err(ApiError::new(Code::QueueFull, detail).with_retry_after(60));
    }
    if is_new {
        app.store.insert_dataset_of(&draft.dataset, draft.new.owner).await?;
    }
    let ahead = app.store.queue().await?;
    let position = 1 + ahead.iter().filter(|job| job.priority >= draft.new.priority).count();
    let answer = |job: &Job| {
        let dto = JobDto::new(job, (&draft.dataset).into(), Some(position), None);
        StoredAnswer {
            status: StatusCode::CREATED.as_u16(),
            location: Some(format!("/jobs/{}", job.id)),
            body: serde_json::to_string(&dto).unwrap_or_default(),
        }
    };
    match app.create_job(&draft.new, key.map(|key| (key, &answer as _))).await {
        Ok(job) => Ok(answer(&job)),
        Err(error) => {
            if is_new {
                app.store.delete_dataset(draft.dataset.id).await?;
            }
            // Between the check and the transaction somebody deleted the base or the dataset.
            Err(match error {
                StoreError::NotFound { what, id } => ApiError::fields(vec![FieldError::new(
                    "/dataset_id",
                    "unknown_value",
                    format!("there is no {what} {id} any more"),
                )]),
                other => other.into(),
            })
        }
    }
}

/// Checks a request completely and finds every fault.
async fn check(app: &App, request: Value, dataset: DatasetOf<'_>, parent: Option<JobId>) -> ApiResult<Checked> {
    let mut errors = Vec::new();
    let mut fields = Fields::of(request.clone(), "", &mut errors);
    let name = fields.required_string("name").map(|n| n.trim().to_owned());
    let name = name.filter(|name| fields.check_label("name", name, 200));
    let model = base_model(app, &mut fields).await?;
    let found = match dataset {
        DatasetOf::Request => named_dataset(app, &mut fields).await?,
        DatasetOf::Upload(_) | DatasetOf::Refused => {
            if fields.take("dataset_id").is_some() {
                fields.fault(
                    "dataset_id",
                    "contradiction",
                    "the request brings its own dataset; leave this out",
                );
            }
            match dataset {
                DatasetOf::Upload(dataset) => Some(dataset.clone()),
                _ => None,
            }
        }
    };
    let given = fields.object("hyperparameters").unwrap_or_default();
    let (sampling, export) = (fields.object("sampling"), fields.object("export"));
    let init_from = fields.object("init_from");
    let tags = fields.labels("tags", 32, 64).unwrap_or_default();
    let notes = notes(&mut fields).unwrap_or_default();
    let priority = fields.integer("priority", -1000..=1000).unwrap_or(0);
    let webhook = fields.object("webhook");
    fields.finish();
    let sampling = sampling_of(sampling.unwrap_or_default(), &mut errors);
    let export = export_of(export.unwrap_or_default(), &mut errors);
    let init_from = init_from::find(app, init_from, &mut errors).await?;
    let webhook = webhooks::of_job(app, webhook, &mut errors)?;
    let hyperparameters =
        model.as_ref().and_then(
            |model| match app.catalog.resolve(&model.info.family, &model.info, &given) {
                Ok(resolved) => Some(resolved),
                Err(faults) => {
                    errors.extend(faults.into_iter().map(|mut fault| {
                        fault.pointer.insert_str(0, "/hyperparameters");
                        fault
                    }));
                    None
                }
            },
        );
    if !errors.is_empty() {
        return Err(ApiError::fields(errors));
    }
    let (Some(name), Some(model), Some(hyperparameters)) = (name, model, hyperparameters) else {
        return Err(ApiError::internal("a field is missing without a fault"));
    };
    let hyperparameters = match init_from {
        Some(file) => init_from::adopt(app, &model, file, given, hyperparameters).await?,
        None => hyperparameters,
    };
    let Some(dataset) = found else {
        return Ok(Checked::WithoutDataset);
    };
    let plan = plan(app, &model, &hyperparameters, &sampling, &dataset).await?;
    let mut request = request;
    if let Value::Object(object) = &mut request {
        object.insert("dataset_id".to_owned(), dataset.id.to_string().into());
    }
    let new = NewJob {
        id: JobId::new(),
        parent_id: parent,
        name,
        tags,
        notes,
        priority,
        base_model: model.id,
        dataset_id: dataset.id,
        family: model.info.family,
        request,
        hyperparameters,
        sampling,
        export,
        plan,
        owner: None,
        webhook,
    };
    Ok(Checked::Complete(Box::new(Draft { new, dataset })))
}

async fn plan(
    app: &App,
    model: &Model,
    hyperparameters: &Map<String, Value>,
    sampling: &Sampling,
    dataset: &Dataset,
) -> ApiResult<Plan> {
    let catalog = Arc::clone(&app.catalog);
    let (model, hyperparameters, sampling) = (model.clone(), hyperparameters.clone(), sampling.clone());
    let (base, data) = (model.id.clone(), dataset.path.clone());
    // Reads the headers of the base's weight files and the list of items.
    let plan = tokio::task::spawn_blocking(move || {
        catalog.plan(
            &model.info.family,
            &model.path,
            &model.info,
            &hyperparameters,
            &sampling,
            &data,
        )
    });
    let plan = plan.await.map_err(ApiError::internal)?.map_err(|mut problem| {
        for error in &mut problem.errors {
            if !error.pointer.starts_with("/hyperparameters") && !error.pointer.starts_with("/sampling") {
                error.pointer.insert_str(0, "/hyperparameters");
            }
        }
        ApiError::with_problem(Code::BaseModelUnfit, problem)
    })?;
    // The host's memory is no measure for a job on another device.
    let device = app.config.scheduler.devices.first().map_or("cpu", String::as_str);
    if device == "cpu" {
        let total = app.memory().map(|memory| memory.total_bytes);
        estimate::fits(&plan, total).map_err(|problem| ApiError::with_problem(Code::MemoryTooSmall, problem))?;
    }
    let runs = app.store.measured_runs(device, estimate::RUNS).await?;
    let factor = estimate::correction(base.as_str(), &plan.workload, plan.step_s, &runs);
    Ok(plan.corrected(factor))
}

async fn base_model(app: &App, fields: &mut Fields<'_>) -> ApiResult<Option<Model>> {
    let Some(text) = fields.required_string("base_model") else {
        return Ok(None);
    };
    let found = match text.parse::<ModelId>() {
        Ok(id) => match app.store.model(&id).await {
            Ok(model) => Some(model),
            Err(StoreError::NotFound { .. }) => None,
            Err(other) => return Err(other.into()),
        },
        Err(_) => None,
    };
    match found {
        Some(model) if model.kind == ModelKind::Base => Ok(Some(model)),
        Some(_) => {
            fields.fault("base_model", "wrong_kind", "this is an adapter; a base model is needed");
            Ok(None)
        }
        None => {
            if let Ok(id) = text.parse::<ModelId>()
                && app.store.download(&id).await?.is_some()
            {
                let detail = format!("{id} has not been downloaded completely; see GET /models/{id}");
                fields.fault("base_model", "not_ready", detail);
                return Ok(None);
            }
            let known: Vec<String> = app.store.models().await?.iter().map(|m| m.id.to_string()).collect();
            let shown: String = text.chars().take(80).collect();
            let detail = format!("there is no base model {shown:?}; known are {}", known.join(", "));
            fields.fault("base_model", "unknown_value", detail);
            Ok(None)
        }
    }
}

async fn named_dataset(app: &App, fields: &mut Fields<'_>) -> ApiResult<Option<Dataset>> {
    let Some(text) = fields.required_string("dataset_id") else {
        return Ok(None);
    };
    if let Ok(id) = text.parse() {
        match app.store.dataset(id).await {
            Ok(dataset) => return Ok(Some(dataset)),
            Err(StoreError::NotFound { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    let shown: String = text.chars().take(80).collect();
    fields.fault("dataset_id", "unknown_value", format!("there is no dataset {shown:?}"));
    Ok(None)
}

fn sampling_of(object: Map<String, Value>, errors: &mut Vec<FieldError>) -> Sampling {
    let default = Sampling::default();
    let mut fields = Fields::of(Value::Object(object), "/sampling", errors);
    let unsigned = |n: i64| n.unsigned_abs();
    let negative_prompt = fields.string("negative_prompt").unwrap_or_default();
    if negative_prompt.chars().count() > 2000 {
        fields.fault("negative_prompt", "out_of_range", "must have at most 2000 characters");
    }
    let sampling = Sampling {
        prompts: fields.labels("prompts", 64, 2000).unwrap_or_default(),
        negative_prompt,
        every_steps: fields
            .integer("every_steps", 0..=1_000_000_000)
            .map_or(default.every_steps, unsigned),
        seed: fields.integer("seed", 0..=(1 << 53)).map_or(default.seed, unsigned),
        num_inference_steps: fields
            .integer("num_inference_steps", 1..=1000)
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(default.num_inference_steps),
        guidance_scale: fields
            .number("guidance_scale", 1.0..=100.0)
            .unwrap_or(default.guidance_scale),
    };
    fields.finish();
    sampling
}

fn export_of(object: Map<String, Value>, errors: &mut Vec<FieldError>) -> Export {
    let mut fields = Fields::of(Value::Object(object), "/export", errors);
    let export = Export {
        merged_pipeline: fields.boolean("merged_pipeline").unwrap_or(false),
    };
    fields.finish();
    export
}

/// Submits the same job again, after it failed or was cancelled.
#[utoipa::path(post, path = "/jobs/{id}/retry", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 201, body = JobDto, headers(("Location" = String))), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto)))]
pub(super) async fn retry_job(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiResult<Response> {
    again(&app, &caller, &id, Action::Retry, Value::Object(Map::new())).await
}

/// What to change in the copy.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CloneRequest)]
pub(super) struct CloneDto {
    /// Merged into the job's request (RFC 7396): e.g. `{"name": "v2", "hyperparameters": {"lora_rank": 16}}`.
    #[schema(value_type = Option<Object>)]
    pub overrides: Option<Map<String, Value>>,
}

/// Submits a copy of a job, with changes.
#[utoipa::path(post, path = "/jobs/{id}/clone", tag = "jobs", params(("id" = String, Path)), request_body = Option<CloneDto>, responses(
    (status = 201, body = JobDto, headers(("Location" = String))), (status = 404, body = ProblemDto), (status = 422, body = ProblemDto)))]
pub(super) async fn clone_job(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let value = body::json_or_empty(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let overrides = fields.object("overrides").unwrap_or_default();
    fields.finish();
    if !errors.is_empty() {
        return Err(ApiError::fields(errors));
    }
    again(&app, &caller, &id, Action::Clone, Value::Object(overrides)).await
}

async fn again(app: &App, caller: &Caller, id: &str, action: Action, overrides: Value) -> ApiResult<Response> {
    let job = app.store.job(job_id(id)?).await?;
    if !job.status.actions().contains(&action) {
        return Err(StoreError::NotAllowed {
            job: job.id,
            status: job.status,
            action,
        }
        .into());
    }
    let mut request = job.request;
    merge(&mut request, overrides);
    let incoming = Incoming {
        request,
        sha256: String::new(),
        upload: None,
        owner: caller.owner(),
    };
    submit(app, incoming, false, None, Some(job.id)).await
}

/// JSON Merge Patch, RFC 7396.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    if let Value::Object(target) = target {
        for (name, value) in patch {
            if value.is_null() {
                target.remove(&name);
            } else {
                merge(target.entry(name).or_insert(Value::Null), value);
            }
        }
    }
}

/// The demo job, ready to be posted to `/jobs`: the bundled base and the bundled dataset.
#[utoipa::path(get, path = "/demo", tag = "jobs", responses(
    (status = 200, body = JobRequestDto), (status = 503, body = ProblemDto, description = "the bundled dataset is not there")))]
pub(super) async fn demo_request(State(app): State<App>) -> ApiResult<Json<Value>> {
    let datasets = app.store.datasets().await?;
    let bundled = datasets.iter().find(|d| d.builtin && d.name == library::BUNDLED);
    let bundled = bundled.ok_or_else(|| ApiError::new(Code::NotReady, "The bundled dataset is not there."))?;
    let mut request: Value = serde_json::from_str(DEMO).map_err(ApiError::internal)?;
    if let Value::Object(object) = &mut request {
        object.insert("dataset_id".to_owned(), bundled.id.to_string().into());
    }
    Ok(Json(request))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_patch_changes_nested_fields_and_null_removes() {
        let mut target = json!({"name": "a", "hyperparameters": {"lora_rank": 4, "seed": 1}, "tags": ["x"]});
        merge(
            &mut target,
            json!({"name": "b", "hyperparameters": {"lora_rank": 8, "seed": null}, "tags": ["y"]}),
        );
        assert_eq!(
            target,
            json!({"name": "b", "hyperparameters": {"lora_rank": 8}, "tags": ["y"]})
        );
    }
}
