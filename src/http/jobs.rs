//! Jobs: read, list, steer. Submitting them is in [`super::submit`].

use axum::{
    Json,
    body::Body,
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use lorad_proto::{
    catalog::Plan,
    problem::Problem,
    spec::{Export, Sampling},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{
    body::{self, Fields},
    dto::{self, List, job_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
    init_from::InitFromDto,
};
use crate::{
    app::App,
    domain::{Action, CancelMode, Dataset, EventKind, Job, JobEvent, JobId, JobPatch, JobStatus, Progress},
    store::JobFilter,
};

/// Alerts told with a job; older ones are in its event stream.
const MAX_ALERTS: u32 = 20;

/// A job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Job)]
pub(super) struct JobDto {
    /// `job_…`
    #[schema(value_type = String)]
    pub id: JobId,
    /// For people.
    pub name: String,
    /// For people.
    pub tags: Vec<String>,
    /// For people.
    pub notes: String,
    /// Higher starts first.
    pub priority: i64,
    /// What is: `validating`, `queued`, `preparing`, `running`, `paused`, `interrupted`, `saving`, `succeeded`, `failed`,
    /// `cancelled`.
    pub status: &'static str,
    /// What was asked: `run`, `pause`, `cancel_save`, `cancel_discard`, `cancel_force`.
    pub desired: &'static str,
    /// The job that this one retries or clones.
    pub parent_id: Option<String>,
    /// Id of the frozen base.
    pub base_model: String,
    /// What it trains on.
    pub dataset: DatasetRefDto,
    /// Model family.
    pub family: String,
    /// Every hyperparameter of the family, defaults filled in.
    #[schema(value_type = Object)]
    pub hyperparameters: Map<String, Value>,
    /// The adapter that it starts from.
    pub init_from: Option<InitFromDto>,
    /// Sample pictures.
    pub sampling: SamplingDto,
    /// Extra results.
    pub export: ExportDto,
    /// What it was expected to do when it was posted.
    pub plan: PlanDto,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Place in the queue, while it is queued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueuePlaceDto>,
    /// Number of the newest attempt; 0: none yet.
    pub attempt: u32,
    /// When it was posted.
    pub created_at: String,
    /// When its first attempt made its first step.
    pub started_at: Option<String>,
    /// When it became final.
    pub finished_at: Option<String>,
    /// Why it failed.
    #[schema(value_type = Option<ProblemDto>)]
    pub error: Option<Problem>,
    /// How far the running attempt is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressDto>,
    /// What the newest alerts say, oldest first; not in lists.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alerts: Vec<AlertDto>,
    /// Figures of the finished job, e.g. `final_loss`.
    #[schema(value_type = Object)]
    pub summary: Map<String, Value>,
    /// What can be done with it now: `cancel`, `pause`, `resume`, `checkpoint`, `sample`, `retry`, `clone`, `delete`.
    #[schema(value_type = Vec<String>)]
    pub allowed: Vec<Action>,
    /// Number of its newest event.
    pub cursor: String,
    /// Where the rest is.
    pub links: LinksDto,
}

/// A job's dataset in short.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = DatasetRef)]
pub(super) struct DatasetRefDto {
    /// `ds_…`
    pub id: String,
    /// For people.
    pub name: String,
    /// Pictures.
    pub n_items: u32,
}

impl From<&Dataset> for DatasetRefDto {
    fn from(dataset: &Dataset) -> Self {
        Self {
            id: dataset.id.to_string(),
            name: dataset.name.clone(),
            n_items: dataset.n_items,
        }
    }
}

/// Sample pictures: the same prompts and seeds at step 0 (base model), every `every_steps`, and at the end.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Sampling)]
pub(super) struct SamplingDto {
    /// Prompt `i` is drawn with seed `seed + i`.
    pub prompts: Vec<String>,
    /// Pushed away from by classifier-free guidance.
    pub negative_prompt: String,
    /// Optimizer steps between sample rounds; 0: only before and after.
    pub every_steps: u64,
    /// First seed.
    pub seed: u64,
    /// Denoising steps.
    pub num_inference_steps: u32,
    /// Classifier-free guidance; 1 turns it off.
    pub guidance_scale: f64,
}

impl From<&Sampling> for SamplingDto {
    fn from(s: &Sampling) -> Self {
        Self {
            prompts: s.prompts.clone(),
            negative_prompt: s.negative_prompt.clone(),
            every_steps: s.every_steps,
            seed: s.seed,
            num_inference_steps: s.num_inference_steps,
            guidance_scale: s.guidance_scale,
        }
    }
}

/// Optional extra results.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Export)]
pub(super) struct ExportDto {
    /// Also write the whole pipeline with the adapter merged in.
    pub merged_pipeline: bool,
}

impl From<&Export> for ExportDto {
    fn from(e: &Export) -> Self {
        Self {
            merged_pipeline: e.merged_pipeline,
        }
    }
}

/// What a job will do.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Plan)]
pub(super) struct PlanDto {
    /// Optimizer steps.
    pub total_steps: u64,
    /// Micro-batches in one pass over the data.
    pub batches_per_epoch: u64,
    /// Parameters that will be trained.
    pub trainable_params: u64,
    /// Estimated peak memory.
    pub memory_bytes: u64,
    /// Estimated time of an optimizer step, seconds.
    pub step_s: f64,
    /// Estimated time of the whole job, seconds: steps, loading, encoding, pictures, validation.
    pub duration_s: f64,
    /// Whether finished jobs on this server corrected the times; otherwise they rest on a short calibration of the machine.
    pub measured: bool,
    /// What a step works on.
    pub workload: String,
    /// Things worth knowing before starting.
    pub warnings: Vec<String>,
}

impl From<&Plan> for PlanDto {
    fn from(p: &Plan) -> Self {
        Self {
            total_steps: p.total_steps,
            batches_per_epoch: p.batches_per_epoch,
            trainable_params: p.trainable_params,
            memory_bytes: p.memory_bytes,
            step_s: p.step_s,
            duration_s: p.duration_s(),
            measured: (p.correction - 1.0).abs() > f64::EPSILON,
            workload: p.workload.clone(),
            warnings: p.warnings.clone(),
        }
    }
}

/// Place in the queue.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = QueuePlace)]
pub(super) struct QueuePlaceDto {
    /// From 1: the next to start.
    pub position: usize,
    /// `memory`: it would start if there were more of it free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<&'static str>,
}

/// How far a running attempt is.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Progress)]
pub(super) struct ProgressDto {
    /// `loading`, `caching`, `checking_gradients`, `sampling`, `training`, `exporting`.
    pub phase: String,
    /// Units done in this phase (pictures, steps, files).
    pub done: u64,
    /// Units in this phase; 0: unknown.
    pub total: u64,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Passes over the data.
    pub epoch: Option<f64>,
    /// Optimizer steps per second, smoothed.
    pub it_s: Option<f64>,
    /// Until the last step, seconds.
    pub eta_s: Option<f64>,
}

impl ProgressDto {
    /// `step`: optimizer steps known to be done, for phases that count something else.
    pub(super) fn new(progress: &Progress, step: u64, total_steps: u64) -> Self {
        let training = progress.phase == "training";
        Self {
            phase: progress.phase.clone(),
            done: progress.step,
            total: progress.total,
            step: if training { progress.step.max(step) } else { step },
            total_steps,
            epoch: progress.epoch,
            it_s: progress.it_s,
            eta_s: progress.eta_s,
        }
    }
}

/// Something a user should look at.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Alert)]
pub(super) struct AlertDto {
    /// Stable: `loss.not_finite`, `caption.truncated`, …
    pub code: String,
    /// `info`, `warn`, `error`.
    pub severity: String,
    /// Step it was seen at.
    pub step: u64,
    /// One sentence.
    pub detail: String,
    /// When.
    pub ts: String,
}

impl From<&JobEvent> for AlertDto {
    fn from(event: &JobEvent) -> Self {
        let text = |key: &str| event.data[key].as_str().unwrap_or_default().to_owned();
        Self {
            code: text("code"),
            severity: text("severity"),
            step: event.data["step"].as_u64().unwrap_or_default(),
            detail: text("detail"),
            ts: rfc3339(event.t_ms),
        }
    }
}

/// Addresses of a job's parts.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = JobLinks)]
pub(super) struct LinksDto {
    #[serde(rename = "self")]
    pub this: String,
    pub events: String,
    pub metrics: String,
    pub logs: String,
    pub samples: String,
    pub files: String,
    pub ui: String,
}

impl JobDto {
    pub(super) fn new(job: &Job, dataset: DatasetRefDto, position: Option<usize>, progress: Option<&Progress>) -> Self {
        let at = format!("/jobs/{}", job.id);
        let active = job.status.is_active();
        Self {
            id: job.id,
            name: job.name.clone(),
            tags: job.tags.clone(),
            notes: job.notes.clone(),
            priority: job.priority,
            status: job.status.as_str(),
            desired: job.desired.as_str(),
            parent_id: job.parent_id.map(|id| id.to_string()),
            base_model: job.base_model.to_string(),
            dataset,
            family: job.family.clone(),
            hyperparameters: job.hyperparameters.clone(),
            init_from: job.init_from().map(Into::into),
            sampling: (&job.sampling).into(),
            export: (&job.export).into(),
            plan: (&job.plan).into(),
            step: job.step,
            total_steps: job.total_steps,
            queue: position.map(|position| QueuePlaceDto {
                position,
                waits_for: None,
            }),
            attempt: job.attempt,
            created_at: rfc3339(job.created_at_ms),
            started_at: job.started_at_ms.map(rfc3339),
            finished_at: job.finished_at_ms.map(rfc3339),
            error: job.error.clone(),
            progress: progress
                .filter(|_| active)
                .map(|p| ProgressDto::new(p, job.step, job.total_steps)),
            alerts: Vec::new(),
            summary: job.summary.clone(),
            allowed: job.status.actions().to_vec(),
            cursor: job.last_seq.to_string(),
            links: LinksDto {
                events: format!("{at}/events"),
                metrics: format!("{at}/metrics"),
                logs: format!("{at}/logs"),
                samples: format!("{at}/samples"),
                files: format!("{at}/files"),
                ui: format!("/#/jobs/{}", job.id),
                this: at,
            },
        }
    }
}

/// A job with what belongs to it.
pub(super) async fn describe(app: &App, job: &Job) -> ApiResult<JobDto> {
    let dataset = app.store.dataset(job.dataset_id).await?;
    let position = if job.status == JobStatus::Queued {
        let queue = app.store.queue().await?;
        queue.iter().position(|queued| queued.id == job.id).map(|i| i + 1)
    } else {
        None
    };
    let progress = app.events.newest_progress(job.id);
    let alerts = app.store.newest_events(job.id, EventKind::Alert, MAX_ALERTS).await?;
    let mut dto = JobDto::new(job, (&dataset).into(), position, progress.as_deref());
    dto.alerts = alerts.iter().map(AlertDto::from).collect();
    if let Some(place) = dto.queue.as_mut().filter(|place| place.position == 1)
        && app.config.scheduler.devices == ["cpu"]
        && app.waits_for_memory(&job.plan)
        && app.store.live_attempts().await?.is_empty()
    {
        place.waits_for = Some("memory");
    }
    Ok(dto)
}

async fn describe_all(app: &App, jobs: &[Job]) -> ApiResult<Vec<JobDto>> {
    let mut datasets = std::collections::HashMap::new();
    let queue: Vec<JobId> = if jobs.iter().any(|job| job.status == JobStatus::Queued) {
        app.store.queue().await?.iter().map(|job| job.id).collect()
    } else {
        Vec::new()
    };
    let mut described = Vec::with_capacity(jobs.len());
    for job in jobs {
        let dataset: DatasetRefDto = match datasets.get(&job.dataset_id) {
            Some(known) => DatasetRefDto::clone(known),
            None => {
                let found = DatasetRefDto::from(&app.store.dataset(job.dataset_id).await?);
                datasets.insert(job.dataset_id, found.clone());
                found
            }
        };
        let position = queue.iter().position(|id| *id == job.id).map(|i| i + 1);
        let progress = app.events.newest_progress(job.id);
        described.push(JobDto::new(job, dataset, position, progress.as_deref()));
    }
    Ok(described)
}

/// Which jobs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// One status, or several separated by commas.
    status: Option<String>,
    /// Part of the name or of the id.
    q: Option<String>,
    /// One of the tags.
    tag: Option<String>,
    /// Id of the last job of the page before.
    after: Option<String>,
    /// 1 to 200, usually 50.
    limit: Option<u32>,
}

/// Lists jobs, newest first.
#[utoipa::path(get, path = "/jobs", tag = "jobs", params(ListQuery), responses(
    (status = 200, body = List<JobDto>), (status = 400, body = ProblemDto, description = "a parameter is not valid")))]
pub(super) async fn list_jobs(State(app): State<App>, Query(query): Query<ListQuery>) -> ApiResult<Json<List<JobDto>>> {
    let mut status = Vec::new();
    for word in query
        .status
        .as_deref()
        .unwrap_or("")
        .split(',')
        .filter(|w| !w.is_empty())
    {
        status.push(JobStatus::parse(word).ok_or_else(|| {
            let known: Vec<&str> = JobStatus::ALL.iter().map(|s| s.as_str()).collect();
            ApiError::new(Code::InvalidQuery, format!("`status` knows {}.", known.join(", ")))
        })?);
    }
    let limit = query.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(ApiError::new(Code::InvalidQuery, "`limit` must be 1 to 200."));
    }
    let after = query.after.map(|text| text.parse::<JobId>()).transpose();
    let filter = JobFilter {
        status,
        q: query.q.filter(|q| !q.is_empty()),
        tag: query.tag.filter(|t| !t.is_empty()),
        after: after.map_err(|_| ApiError::new(Code::InvalidCursor, "`after` must be the id of a job."))?,
        limit,
    };
    let page = app.store.jobs(&filter).await?;
    let data = describe_all(&app, &page.data).await?;
    Ok(Json(List {
        first_id: data.first().map(|job| job.id.to_string()),
        last_id: data.last().map(|job| job.id.to_string()),
        has_more: page.has_more,
        ..List::complete(data)
    }))
}

/// Reads a job. A browser that opens this address is sent to the job's page.
#[utoipa::path(get, path = "/jobs/{id}", tag = "jobs", params(("id" = String, Path, description = "`job_…`")), responses(
    (status = 200, body = JobDto, headers(("ETag" = String))), (status = 303, description = "to the page, for `Accept: text/html`"),
    (status = 304, description = "unchanged"), (status = 404, body = ProblemDto)))]
pub(super) async fn get_job(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> ApiResult<Response> {
    let job = app.store.job(job_id(&id)?).await?;
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    if accept
        .split(',')
        .next()
        .is_some_and(|first| first.trim().starts_with("text/html"))
    {
        let to = [
            (header::LOCATION, format!("/#/jobs/{}", job.id)),
            (header::VARY, "Accept".to_owned()),
        ];
        return Ok((StatusCode::SEE_OTHER, to).into_response());
    }
    answer(&app, &job, StatusCode::OK, &headers).await
}

/// The job as an answer with its `ETag`; 304 if the client has it.
async fn answer(app: &App, job: &Job, status: StatusCode, headers: &HeaderMap) -> ApiResult<Response> {
    let body = serde_json::to_vec(&describe(app, job).await?).map_err(ApiError::internal)?;
    let etag = dto::etag_of(&body);
    let mut response = if dto::lists_etag(headers, header::IF_NONE_MATCH, &etag) == Some(true) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
    };
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
        .headers_mut()
        .insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

/// What may be changed; fields left out stay.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = JobPatch)]
pub(super) struct JobPatchDto {
    /// 1 to 200 characters.
    pub name: Option<String>,
    /// At most 32, each at most 64 characters.
    pub tags: Option<Vec<String>>,
    /// At most 10 000 characters.
    pub notes: Option<String>,
    /// -1000 to 1000; higher starts first.
    pub priority: Option<i64>,
}

/// Changes a job's name, tags, notes or priority.
#[utoipa::path(patch, path = "/jobs/{id}", tag = "jobs", params(("id" = String, Path)), request_body = JobPatchDto, responses(
    (status = 200, body = JobDto), (status = 404, body = ProblemDto), (status = 412, body = ProblemDto, description = "`If-Match` does not hold"),
    (status = 422, body = ProblemDto)))]
pub(super) async fn patch_job(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let id = job_id(&id)?;
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let patch = JobPatch {
        name: fields.label("name", 200),
        tags: fields.labels("tags", 32, 64),
        notes: notes(&mut fields),
        priority: fields.integer("priority", -1000..=1000),
    };
    fields.finish();
    if !errors.is_empty() {
        return Err(ApiError::fields(errors));
    }
    let job = app.store.job(id).await?;
    if headers.contains_key(header::IF_MATCH) {
        let body = serde_json::to_vec(&describe(&app, &job).await?).map_err(ApiError::internal)?;
        if dto::lists_etag(&headers, header::IF_MATCH, &dto::etag_of(&body)) != Some(true) {
            return Err(ApiError::new(
                Code::PreconditionFailed,
                "The job has changed since it was read.",
            ));
        }
    }
    let job = app.update_job(id, &patch).await?;
    answer(&app, &job, StatusCode::OK, &HeaderMap::new()).await
}

/// Notes are free text of several lines, so they are no label.
pub(super) fn notes(fields: &mut Fields<'_>) -> Option<String> {
    let text = fields.string("notes")?;
    if text.chars().count() > 10_000 || text.contains('\0') {
        fields.fault("notes", "out_of_range", "must have at most 10000 characters and no NUL");
        return None;
    }
    Some(text)
}

/// What happens to the result files.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteQuery {
    /// `delete`, which is also what happens without it: files of a job that is gone would have no address.
    artifacts: Option<String>,
}

/// Deletes a finished job with its files.
#[utoipa::path(delete, path = "/jobs/{id}", tag = "jobs", params(("id" = String, Path), DeleteQuery), responses(
    (status = 204), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto,
        description = "it is not finished, or a job that is not finished starts from one of its files")))]
pub(super) async fn delete_job(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> ApiResult<StatusCode> {
    if query.artifacts.is_some_and(|word| word != "delete") {
        return Err(ApiError::new(
            Code::InvalidQuery,
            "`artifacts` must be delete: nothing could reach the files of a job that is gone. Download them first.",
        ));
    }
    app.delete_job(job_id(&id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How to cancel.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CancelRequest)]
pub(super) struct CancelDto {
    /// `save` (export what has been trained), `discard` (stop at the next step; the default), `force` (kill now).
    pub mode: Option<String>,
}

/// Cancels a job.
#[utoipa::path(post, path = "/jobs/{id}/cancel", tag = "jobs", params(("id" = String, Path)), request_body = Option<CancelDto>, responses(
    (status = 202, body = JobDto), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto, description = "it is final; `allowed` says what is possible")))]
pub(super) async fn cancel_job(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let id = job_id(&id)?;
    let value = body::json_or_empty(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let mode = fields.string("mode").map(|word| (CancelMode::parse(&word), word));
    if let Some((None, word)) = &mode {
        fields.fault(
            "mode",
            "unknown_value",
            format!("must be save, discard or force, is {word:?}"),
        );
    }
    fields.finish();
    if !errors.is_empty() {
        return Err(ApiError::fields(errors));
    }
    let mode = mode.and_then(|(mode, _)| mode).unwrap_or(CancelMode::Discard);
    let job = app.cancel_job(id, mode).await?;
    answer(&app, &job, StatusCode::ACCEPTED, &HeaderMap::new()).await
}

/// Reads a body that must be empty or `{}`.
async fn no_fields(headers: &HeaderMap, body: Body) -> ApiResult<()> {
    let mut errors = Vec::new();
    Fields::of(body::json_or_empty(headers, body).await?, "", &mut errors).finish();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(ApiError::fields(errors))
    }
}

/// Pauses a job: a checkpoint is written and the device freed.
#[utoipa::path(post, path = "/jobs/{id}/pause", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 202, body = JobDto), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto)))]
pub(super) async fn pause_job(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    no_fields(&headers, body).await?;
    let job = app.pause_job(job_id(&id)?).await?;
    answer(&app, &job, StatusCode::ACCEPTED, &HeaderMap::new()).await
}

/// Resumes a paused job from its newest checkpoint.
#[utoipa::path(post, path = "/jobs/{id}/resume", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 202, body = JobDto), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto)))]
pub(super) async fn resume_job(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    no_fields(&headers, body).await?;
    let job = app.resume_job(job_id(&id)?).await?;
    answer(&app, &job, StatusCode::ACCEPTED, &HeaderMap::new()).await
}

/// Asks a running job for a checkpoint at the next step boundary.
#[utoipa::path(post, path = "/jobs/{id}/checkpoint", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 202, body = JobDto), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto)))]
pub(super) async fn checkpoint_job(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    no_fields(&headers, body).await?;
    let job = app.ask_job(job_id(&id)?, Action::Checkpoint).await?;
    answer(&app, &job, StatusCode::ACCEPTED, &HeaderMap::new()).await
}

/// Asks a running job for sample pictures at the next step boundary.
#[utoipa::path(post, path = "/jobs/{id}/sample", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 202, body = JobDto), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto)))]
pub(super) async fn sample_job(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    no_fields(&headers, body).await?;
    let job = app.ask_job(job_id(&id)?, Action::Sample).await?;
    answer(&app, &job, StatusCode::ACCEPTED, &HeaderMap::new()).await
}

/// The queue: next to start first.
#[utoipa::path(get, path = "/queue", tag = "jobs", responses((status = 200, body = List<JobDto>)))]
pub(super) async fn queue(State(app): State<App>) -> ApiResult<Json<List<JobDto>>> {
    let jobs = app.store.queue().await?;
    Ok(Json(List::complete(describe_all(&app, &jobs).await?)))
}
