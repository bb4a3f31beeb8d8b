//! The HTTP surface: the only place with routes and status codes. [`router`] shows the whole API.
//!
//! Handlers stand with their DTOs in one file per resource and convert between three sets of types: wire (here), domain,
//! and the worker protocol. They hold an [`App`] and know neither SQL nor the trainer's insides.

mod access;
mod api_keys;
mod assets;
mod audit;
mod body;
mod client;
mod datasets;
mod dto;
pub mod error;
mod families;
mod files;
mod guard;
mod health;
mod init_from;
mod jobs;
mod limiter;
pub(crate) mod listen;
mod metrics;
mod models;
mod session;
mod sse;
mod submit;
mod webhooks;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use axum::{Extension, Router, extract::DefaultBodyLimit, http::StatusCode, middleware, routing::get};
use tower_http::{catch_panic::CatchPanicLayer, timeout::TimeoutLayer};
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::app::App;
use error::{ApiError, Code};

/// Head of the OpenAPI document; paths come from the handlers.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "lorad",
        description = "A self-hosted LoRA fine-tuning server. Errors are `application/problem+json` (RFC 9457) with a stable `code`; all field errors of a request come at once."
    ),
    tags(
        (name = "jobs", description = "Fine-tuning jobs: submit, watch, steer."),
        (name = "results", description = "What a job leaves behind: metrics, logs, samples, files."),
        (name = "datasets", description = "Pictures with captions."),
        (name = "models", description = "Base models and model families."),
        (name = "access", description = "API keys, sessions, the audit log. Without a key the server is open; the first one locks it."),
        (name = "webhooks", description = "Outward calls about jobs, signed as Standard Webhooks says."),
        (name = "server", description = "Health, versions, figures."),
    ),
    components(schemas(error::ProblemDto, error::FieldErrorDto))
)]
struct Api;

/// Requests that have their own, shorter time limit.
fn resources() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        // jobs
        .routes(routes!(jobs::list_jobs))
        .routes(routes!(jobs::get_job, jobs::patch_job, jobs::delete_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(jobs::pause_job))
        .routes(routes!(jobs::resume_job))
        .routes(routes!(jobs::checkpoint_job))
        .routes(routes!(jobs::sample_job))
        .routes(routes!(submit::retry_job))
        .routes(routes!(submit::clone_job))
        .routes(routes!(jobs::queue))
        .routes(routes!(submit::demo_request))
        // results
        .routes(routes!(metrics::job_metrics))
        .routes(routes!(metrics::job_logs))
        .routes(routes!(files::job_samples))
        .routes(routes!(files::job_checkpoints))
        .routes(routes!(files::job_files))
        // datasets
        .routes(routes!(datasets::list_datasets))
        .routes(routes!(datasets::get_dataset, datasets::delete_dataset))
        .routes(routes!(datasets::dataset_items))
        .routes(routes!(datasets::item_thumbnail))
        // models
        .routes(routes!(models::list_models, models::register_model))
        .routes(routes!(models::get_model, models::delete_model))
        .routes(routes!(families::list_families))
        .routes(routes!(families::family_schema))
        // access
        .routes(routes!(
            session::get_session,
            session::create_session,
            session::delete_session
        ))
        .routes(routes!(api_keys::list_keys, api_keys::create_key))
        .routes(routes!(api_keys::get_key, api_keys::patch_key, api_keys::revoke_key))
        .routes(routes!(audit::list_audit))
        // webhooks
        .routes(routes!(webhooks::list_webhooks, webhooks::create_webhook))
        .routes(routes!(
            webhooks::get_webhook,
            webhooks::patch_webhook,
            webhooks::delete_webhook
        ))
        .routes(routes!(webhooks::test_webhook))
        .routes(routes!(webhooks::webhook_deliveries))
        .routes(routes!(webhooks::redeliver))
        .routes(routes!(webhooks::job_webhook))
        // server
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .routes(routes!(health::system))
        .routes(routes!(health::version))
        .routes(routes!(health::prometheus))
}

/// Requests that last as long as their bodies or their viewers do.
fn long_lived() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(submit::create_job))
        .routes(routes!(datasets::create_dataset))
        .routes(routes!(sse::job_events))
        .routes(routes!(files::job_file, files::job_file_head))
}

/// The OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = Api::openapi();
    document.merge(resources().into_openapi());
    document.merge(long_lived().into_openapi());
    access::document(&mut document);
    document
}

/// Figures of the HTTP surface itself.
#[derive(Debug, Default)]
struct HttpFigures {
    /// Open event streams.
    streams: AtomicU64,
    requests: AtomicU64,
    server_errors: AtomicU64,
}

/// The whole API and the dashboard.
pub fn router(app: App) -> Router {
    let document = openapi();
    let server = &app.config.server;
    let timeout = Duration::from_millis(server.request_timeout_ms);
    let hosts = guard::AllowedHosts(Arc::new(server.allowed_hosts.clone()));
    let figures = Arc::new(HttpFigures::default());
    let access = access::Access::new(app.clone());
    let short = Router::from(resources()).layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, timeout));
    let upload_limit = usize::try_from(app.config.limits.upload_bytes).unwrap_or(usize::MAX);
    let long = Router::from(long_lived()).layer(DefaultBodyLimit::max(upload_limit));
    Router::new()
        .merge(short)
        .merge(long)
        .route("/openapi.json", get(move || async move { axum::Json(document) }))
        .fallback(assets::dashboard)
        .method_not_allowed_fallback(async || {
            ApiError::new(Code::MethodNotAllowed, "The address exists, the method does not.")
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&access), access::authorize))
        .layer(middleware::from_fn_with_state(hosts.clone(), guard::same_site))
        .layer(middleware::from_fn_with_state(hosts, guard::host_allow_list))
        .layer(CatchPanicLayer::custom(guard::panicked))
        .layer(middleware::from_fn_with_state(Arc::clone(&figures), health::count))
        .layer(middleware::from_fn_with_state(
            app.traces.clone(),
            guard::request_context,
        ))
        .layer(Extension(figures))
        .layer(Extension(access))
        .with_state(app)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[test]
    fn the_document_is_openapi_3_1_and_every_operation_is_described() {
        let document = serde_json::to_value(openapi()).unwrap();
        assert!(
            document["openapi"].as_str().unwrap().starts_with("3.1"),
            "{}",
            document["openapi"]
        );
        let mut n = 0;
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert!(operation["summary"].is_string(), "{method} {path} has no summary");
                assert!(operation["tags"][0].is_string(), "{method} {path} has no tag");
                n += 1;
            }
        }
        assert!(n > 35, "{n} operations");
    }
}
