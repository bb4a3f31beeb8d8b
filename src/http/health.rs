//! Health, versions and figures of the server itself.

use std::{
    fmt::Write as _,
    sync::{Arc, LazyLock, atomic::Ordering},
    time::Instant,
};

use axum::{
    Extension, Json,
    extract::{Request, State},
    http::header,
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    HttpFigures,
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::{app::App, domain::JobStatus};

static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Counts requests and server errors.
pub(super) async fn count(State(figures): State<Arc<HttpFigures>>, request: Request, next: Next) -> Response {
    LazyLock::force(&STARTED);
    let response = next.run(request).await;
    figures.requests.fetch_add(1, Ordering::Relaxed);
    if response.status().is_server_error() {
        figures.server_errors.fetch_add(1, Ordering::Relaxed);
    }
    response
}

/// A healthy answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Health)]
pub(super) struct HealthDto {
    /// Always `ok`; what is wrong is answered as a problem.
    pub status: &'static str,
}

/// Whether the process answers; checks nothing else.
#[utoipa::path(get, path = "/livez", tag = "server", responses((status = 200, body = HealthDto)))]
pub(super) async fn livez() -> Json<HealthDto> {
    Json(HealthDto { status: "ok" })
}

/// Whether requests can be served: the database answers, and the server is not shutting down.
#[utoipa::path(get, path = "/readyz", tag = "server", responses((status = 200, body = HealthDto), (status = 503, body = ProblemDto)))]
pub(super) async fn readyz(State(app): State<App>) -> ApiResult<Json<HealthDto>> {
    if app.shutdown.is_cancelled() {
        return Err(ApiError::new(Code::ShuttingDown, "The server is shutting down.").with_retry_after(5));
    }
    app.store
        .ping()
        .await
        .map_err(|_| ApiError::new(Code::NotReady, "The database does not answer.").with_retry_after(5))?;
    Ok(Json(HealthDto { status: "ok" }))
}

/// This machine.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = System)]
pub(super) struct SystemDto {
    /// Seconds since the server started.
    pub uptime_s: u64,
    /// Processor cores.
    pub cpus: usize,
    /// Load average of the last minute.
    pub load_1m: f64,
    /// Main memory.
    pub memory_total_bytes: u64,
    /// Main memory that programs could still get.
    pub memory_available_bytes: u64,
    /// Size of the disk under the data directory.
    pub disk_total_bytes: u64,
    /// Free there.
    pub disk_available_bytes: u64,
    /// Result files of all jobs.
    pub artifact_bytes: u64,
    /// Devices that jobs run on.
    pub devices: Vec<String>,
    /// Jobs per status.
    #[schema(value_type = std::collections::BTreeMap<String, u64>)]
    pub jobs: serde_json::Map<String, serde_json::Value>,
}

/// Processor, memory, disk, devices.
#[utoipa::path(get, path = "/system", tag = "server", responses((status = 200, body = SystemDto)))]
pub(super) async fn system(State(app): State<App>) -> ApiResult<Json<SystemDto>> {
    let counts = app.store.job_counts().await?;
    let artifact_bytes = app.store.artifact_bytes().await?;
    let root = app.data.root();
    let (memory, disk, load) = tokio::task::spawn_blocking(move || {
        let disk = rustix::fs::statvfs(&root).ok();
        let memory = sysinfo::System::new().map(|mut system| {
            system.refresh_memory();
            (system.total_memory(), system.available_memory())
        });
        let load = sysinfo::System::load_average().map_or(0.0, |load| load.one);
        (memory.unwrap_or_default(), disk, load)
    })
    .await
    .map_err(ApiError::internal)?;
    Ok(Json(SystemDto {
        uptime_s: STARTED.elapsed().as_secs(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        load_1m: load,
        memory_total_bytes: memory.0,
        memory_available_bytes: memory.1,
        disk_total_bytes: disk.as_ref().map_or(0, |d| d.f_blocks * d.f_frsize),
        disk_available_bytes: disk.as_ref().map_or(0, |d| d.f_bavail * d.f_frsize),
        artifact_bytes,
        devices: app.config.scheduler.devices.clone(),
        jobs: counts
            .iter()
            .map(|(status, n)| (status.as_str().to_owned(), (*n).into()))
            .collect(),
    }))
}

/// Versions and limits.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Version)]
pub(super) struct VersionDto {
    /// Of this build.
    pub version: &'static str,
    /// Between server and workers.
    pub protocol: u32,
    /// Whether this build can train.
    pub trains: bool,
    /// What requests may hold.
    pub limits: LimitsDto,
}

/// What requests may hold.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Limits)]
pub(super) struct LimitsDto {
    /// Largest upload.
    pub upload_bytes: u64,
    /// Largest JSON body.
    pub json_bytes: u64,
    /// Files in an archive.
    pub archive_entries: u64,
    /// Unpacked archive.
    pub archive_unpacked_bytes: u64,
    /// Characters of a caption.
    pub caption_chars: u64,
    /// Jobs in the queue.
    pub queued_jobs: u64,
}

/// Version and limits.
#[utoipa::path(get, path = "/version", tag = "server", responses((status = 200, body = VersionDto)))]
pub(super) async fn version(State(app): State<App>) -> Json<VersionDto> {
    let limits = &app.config.limits;
    Json(VersionDto {
        version: env!("CARGO_PKG_VERSION"),
        protocol: lorad_proto::PROTOCOL_VERSION,
        trains: cfg!(feature = "train"),
        limits: LimitsDto {
            upload_bytes: limits.upload_bytes,
            json_bytes: limits.json_bytes,
            archive_entries: limits.archive_entries,
            archive_unpacked_bytes: limits.archive_unpacked_bytes,
            caption_chars: limits.caption_chars,
            queued_jobs: limits.queued_jobs,
        },
    })
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn prometheus(
    State(app): State<App>,
    Extension(figures): Extension<Arc<HttpFigures>>,
) -> ApiResult<Response> {
    let counts = app.store.job_counts().await?;
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let one = |value: f64| [(String::new(), value)];
    #[expect(clippy::cast_precision_loss, reason = "Prometheus counts in f64")]
    let float = |n: u64| n as f64;
    let version = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    family("lorad_build_info", "gauge", "Version of this build.", &[(version, 1.0)]);
    let jobs: Vec<(String, f64)> = JobStatus::ALL
        .iter()
        .map(|status| {
            let n = counts.iter().find(|(s, _)| s == status).map_or(0, |(_, n)| *n);
            (format!("{{status=\"{status}\"}}"), float(n))
        })
        .collect();
    family("lorad_jobs", "gauge", "Jobs by status.", &jobs);
    let streams = figures.streams.load(Ordering::Relaxed);
    family(
        "lorad_sse_streams",
        "gauge",
        "Open event streams.",
        &one(float(streams)),
    );
    let requests = figures.requests.load(Ordering::Relaxed);
    family(
        "lorad_http_requests_total",
        "counter",
        "Requests answered.",
        &one(float(requests)),
    );
    let errors = figures.server_errors.load(Ordering::Relaxed);
    family(
        "lorad_http_server_errors_total",
        "counter",
        "Requests answered with 5xx.",
        &one(float(errors)),
    );
    let bytes = app.store.artifact_bytes().await?;
    family(
        "lorad_artifact_bytes",
        "gauge",
        "Size of all result files.",
        &one(float(bytes)),
    );
    Ok((
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        out,
    )
        .into_response())
}
