//! Managing webhooks, and the log of what became of their deliveries.

use axum::{
    Json,
    body::Body,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use lorad_proto::problem::FieldError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{
    body::{self, Fields},
    dto::{List, job_id, message_id, rfc3339, webhook_id},
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::{
    app::App,
    domain::{Delivery, NewWebhook, Webhook, WebhookEvent, WebhookPatch},
    webhooks::{Policy, new_secret, secret_bytes},
};

/// Deliveries in one answer.
const PAGE: u32 = 50;

/// A webhook.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Webhook)]
pub(super) struct WebhookDto {
    /// `wh_…`
    pub id: String,
    /// The job that it belongs to; null: it hears of every job.
    pub job_id: Option<String>,
    /// Where to.
    pub url: String,
    /// About what: `job.created`, `job.started`, `job.paused`, `job.interrupted`, `job.succeeded`, `job.failed`,
    /// `job.cancelled`.
    #[schema(value_type = Vec<String>)]
    pub events: Vec<WebhookEvent>,
    /// For people.
    pub description: String,
    /// Whether it is told anything.
    pub enabled: bool,
    /// Why not.
    pub disabled_reason: Option<String>,
    /// Since when every attempt failed.
    pub failing_since: Option<String>,
    /// When it was made.
    pub created_at: String,
    /// Signs the messages (Standard Webhooks); only in the answer that makes it, and with a job's own webhook.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

fn describe(webhook: &Webhook, with_secret: bool) -> WebhookDto {
    WebhookDto {
        id: webhook.id.to_string(),
        job_id: webhook.job_id.map(|id| id.to_string()),
        url: webhook.url.clone(),
        events: webhook.events.clone(),
        description: webhook.description.clone(),
        enabled: webhook.enabled,
        disabled_reason: webhook.disabled_reason.clone(),
        failing_since: webhook.failing_since_ms.map(rfc3339),
        created_at: rfc3339(webhook.created_at_ms),
        secret: with_secret.then(|| webhook.secret.clone()),
    }
}

/// An event on its way to a webhook.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Delivery)]
pub(super) struct DeliveryDto {
    /// `msg_…`; the header `webhook-id` of every attempt.
    pub id: String,
    /// About what.
    pub event: String,
    /// `pending`, `delivered` or `failed` (given up).
    pub status: &'static str,
    /// The body.
    #[schema(value_type = Object)]
    pub payload: Value,
    /// When it happened.
    pub created_at: String,
    /// When it is tried next.
    pub next_attempt_at: Option<String>,
    /// What became of each attempt, oldest first.
    pub attempts: Vec<DeliveryAttemptDto>,
}

/// An attempt to deliver.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeliveryAttempt)]
pub(super) struct DeliveryAttemptDto {
    /// When.
    pub at: String,
    /// How long it took.
    pub duration_ms: u64,
    /// What the receiver answered, if it did. Its body is not kept.
    pub http_status: Option<u16>,
    /// Why it did not count; null: delivered.
    pub error: Option<String>,
}

impl From<Delivery> for DeliveryDto {
    fn from(delivery: Delivery) -> Self {
        let attempts = delivery.attempts.into_iter().map(|attempt| DeliveryAttemptDto {
            at: rfc3339(attempt.t_ms),
            duration_ms: attempt.duration_ms,
            http_status: attempt.http_status,
            error: attempt.error,
        });
        Self {
            id: delivery.id.to_string(),
            event: delivery.event,
            status: delivery.status.as_str(),
            payload: serde_json::from_str(&delivery.payload).unwrap_or_default(),
            created_at: rfc3339(delivery.created_at_ms),
            next_attempt_at: delivery.next_attempt_ms.map(rfc3339),
            attempts: attempts.collect(),
        }
    }
}

/// A webhook to make.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = WebhookRequest)]
pub(super) struct WebhookRequestDto {
    /// Absolute, `https`, and on the public internet unless the settings allow more.
    pub url: String,
    /// Left out: `job.succeeded`, `job.failed`, `job.cancelled`.
    pub events: Option<Vec<String>>,
    /// `whsec_` and 24 to 64 bytes in base64; left out: a random one.
    pub secret: Option<String>,
    /// At most 200 characters.
    pub description: Option<String>,
}

/// Lists the webhooks that hear of every job, newest first.
#[utoipa::path(get, path = "/webhooks", tag = "webhooks", responses((status = 200, body = List<WebhookDto>)))]
pub(super) async fn list_webhooks(State(app): State<App>) -> ApiResult<Json<List<WebhookDto>>> {
    let webhooks = app.store.webhooks().await?;
    Ok(Json(List::complete(
        webhooks.iter().map(|w| describe(w, false)).collect(),
    )))
}

/// Makes a webhook that hears of every job. The answer holds its secret, this once.
#[utoipa::path(post, path = "/webhooks", tag = "webhooks", request_body = WebhookRequestDto, responses(
    (status = 201, body = WebhookDto, headers(("Location" = String))), (status = 422, body = ProblemDto)))]
pub(super) async fn create_webhook(State(app): State<App>, headers: HeaderMap, body: Body) -> ApiResult<Response> {
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let new = new_webhook(&app, value, "", &mut errors)?;
    let (Some(new), true) = (new, errors.is_empty()) else {
        return Err(ApiError::fields(errors));
    };
    let webhook = app.store.insert_webhook(&new).await?;
    let head = [
        (header::LOCATION, format!("/webhooks/{}", webhook.id)),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    Ok((StatusCode::CREATED, head, Json(describe(&webhook, true))).into_response())
}

/// Reads a webhook, without its secret.
#[utoipa::path(get, path = "/webhooks/{id}", tag = "webhooks", params(("id" = String, Path, description = "`wh_…`")), responses(
    (status = 200, body = WebhookDto), (status = 404, body = ProblemDto)))]
pub(super) async fn get_webhook(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<WebhookDto>> {
    Ok(Json(describe(&app.store.webhook(webhook_id(&id)?).await?, false)))
}

/// What to change.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = WebhookPatch)]
pub(super) struct WebhookPatchDto {
    /// New address.
    pub url: Option<String>,
    /// New events.
    pub events: Option<Vec<String>>,
    /// At most 200 characters.
    pub description: Option<String>,
    /// On or off; on also forgets past failures.
    pub enabled: Option<bool>,
}

/// Changes a webhook. For a new secret make a new webhook, and delete the old one when the receiver knows both.
#[utoipa::path(patch, path = "/webhooks/{id}", tag = "webhooks", params(("id" = String, Path)), request_body = WebhookPatchDto, responses(
    (status = 200, body = WebhookDto), (status = 404, body = ProblemDto), (status = 422, body = ProblemDto)))]
pub(super) async fn patch_webhook(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Json<WebhookDto>> {
    let id = webhook_id(&id)?;
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let url = fields.string("url");
    check_url(&app, &mut fields, url.as_deref());
    let events = events(&mut fields);
    let description = fields.label("description", 200);
    let enabled = fields.boolean("enabled");
    fields.finish();
    if !errors.is_empty() {
        return Err(ApiError::fields(errors));
    }
    let patch = WebhookPatch {
        url,
        events,
        description,
        enabled,
    };
    Ok(Json(describe(&app.store.update_webhook(id, &patch).await?, false)))
}

/// Forgets a webhook with its deliveries.
#[utoipa::path(delete, path = "/webhooks/{id}", tag = "webhooks", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = ProblemDto)))]
pub(super) async fn delete_webhook(State(app): State<App>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    app.store.delete_webhook(webhook_id(&id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sends a `webhook.test` message.
#[utoipa::path(post, path = "/webhooks/{id}/test", tag = "webhooks", params(("id" = String, Path)), responses(
    (status = 202, body = DeliveryDto), (status = 404, body = ProblemDto)))]
pub(super) async fn test_webhook(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Response> {
    let webhook = app.store.webhook(webhook_id(&id)?).await?;
    let delivery = app.store.test_webhook(webhook.id).await?;
    Ok((StatusCode::ACCEPTED, Json(DeliveryDto::from(delivery))).into_response())
}

/// Which deliveries.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct DeliveriesQuery {
    /// Only deliveries older than this one.
    after: Option<String>,
}

/// Lists what was sent, or waits to be, with every attempt, newest first.
#[utoipa::path(get, path = "/webhooks/{id}/deliveries", tag = "webhooks", params(("id" = String, Path), DeliveriesQuery), responses(
    (status = 200, body = List<DeliveryDto>), (status = 404, body = ProblemDto)))]
pub(super) async fn webhook_deliveries(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<DeliveriesQuery>,
) -> ApiResult<Json<List<DeliveryDto>>> {
    let webhook = app.store.webhook(webhook_id(&id)?).await?;
    let after = query.after.as_deref().map(message_id).transpose()?;
    let (found, has_more) = app.store.deliveries(webhook.id, after, PAGE).await?;
    let ends = |delivery: Option<&Delivery>| delivery.map(|d| d.id.to_string());
    Ok(Json(List {
        has_more,
        first_id: ends(found.first()),
        last_id: ends(found.last()),
        ..List::complete(found.into_iter().map(DeliveryDto::from).collect())
    }))
}

/// Sends a delivery once more, under the same `webhook-id`, whatever became of it.
#[utoipa::path(post, path = "/webhooks/{id}/deliveries/{delivery}/redeliver", tag = "webhooks", params(("id" = String, Path), ("delivery" = String, Path, description = "`msg_…`")), responses(
    (status = 202, body = DeliveryDto), (status = 404, body = ProblemDto)))]
pub(super) async fn redeliver(
    State(app): State<App>,
    Path((id, delivery)): Path<(String, String)>,
) -> ApiResult<Response> {
    let delivery = app.store.redeliver(webhook_id(&id)?, message_id(&delivery)?).await?;
    Ok((StatusCode::ACCEPTED, Json(DeliveryDto::from(delivery))).into_response())
}

/// Reads a job's own webhook with its secret.
#[utoipa::path(get, path = "/jobs/{id}/webhook", tag = "webhooks", params(("id" = String, Path)), responses(
    (status = 200, body = WebhookDto), (status = 404, body = ProblemDto)))]
pub(super) async fn job_webhook(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<WebhookDto>> {
    let job = app.store.job(job_id(&id)?).await?;
    let webhook = app.store.job_webhook(job.id).await?;
    let webhook = webhook.ok_or_else(|| ApiError::new(Code::WebhookNotFound, format!("{} has no webhook.", job.id)))?;
    Ok(Json(describe(&webhook, true)))
}

/// The webhook that a request describes; faults are noted under pointer `at`.
pub(super) fn new_webhook(
    app: &App,
    value: Value,
    at: &str,
    errors: &mut Vec<FieldError>,
) -> ApiResult<Option<NewWebhook>> {
    let mut fields = Fields::of(value, at, errors);
    let url = fields.required_string("url");
    check_url(app, &mut fields, url.as_deref());
    let events = events(&mut fields);
    let secret = match fields.string("secret") {
        Some(secret) => {
            if secret_bytes(&secret).is_none() {
                fields.fault("secret", "invalid_value", "must be whsec_ and 24 to 64 bytes in base64");
            }
            secret
        }
        None => new_secret().map_err(ApiError::internal)?,
    };
    let description = fields.label("description", 200).unwrap_or_default();
    fields.finish();
    let over = [WebhookEvent::Succeeded, WebhookEvent::Failed, WebhookEvent::Cancelled];
    Ok(url.map(|url| NewWebhook {
        url,
        events: events.unwrap_or_else(|| over.to_vec()),
        secret,
        description,
    }))
}

/// The webhook in a job's request.
pub(super) fn of_job(
    app: &App,
    object: Option<Map<String, Value>>,
    errors: &mut Vec<FieldError>,
) -> ApiResult<Option<NewWebhook>> {
    object.map_or(Ok(None), |object| {
        new_webhook(app, Value::Object(object), "/webhook", errors)
    })
}

/// Early, for whoever writes the address; what counts is the check when the connection is made.
fn check_url(app: &App, fields: &mut Fields<'_>, url: Option<&str>) {
    let Some(url) = url else { return };
    if url.len() > 2000 {
        fields.fault("url", "out_of_range", "must have at most 2000 characters");
    } else if let Err(refusal) = Policy::from(&app.config.webhooks).check(url) {
        fields.fault("url", "not_allowed", refusal.to_string());
    }
}

fn events(fields: &mut Fields<'_>) -> Option<Vec<WebhookEvent>> {
    let names = fields.labels("events", 16, 40)?;
    let known = || WebhookEvent::ALL.iter().filter(|event| **event != WebhookEvent::Test);
    let mut events = Vec::new();
    for (i, name) in names.iter().enumerate() {
        match known().find(|event| event.as_str() == name) {
            Some(event) if !events.contains(event) => events.push(*event),
            Some(_) => {}
            None => {
                let all: Vec<&str> = known().map(|event| event.as_str()).collect();
                let detail = format!("there is no such event; known are {}", all.join(", "));
                fields.fault(&format!("events/{i}"), "unknown_value", detail);
            }
        }
    }
    if names.is_empty() {
        fields.fault("events", "out_of_range", "must name at least one event");
    }
    Some(events)
}
