//! Traces: a span for each request, attempt and job, sent over OTLP/HTTP to the collector that `traces.otlp_endpoint` names.
//!
//! A span is made when what it tells of has ended, from what is known then, so nothing is held meanwhile, and an attempt that
//! outlived a server is whole in the next one's. A job is a trace, whose id is the job's own digits: its attempts find it
//! without asking, and so does whoever knows the job. A request belongs to its client's trace (W3C `traceparent`) or to one of
//! its own, and links to the job that it is about.
//!
//! The SDK's queue is bounded and its thread sends: nothing here waits. What does not fit is dropped, and a collector that is
//! down costs one warning. Why not `tracing-opentelemetry`: docs/adr/0012. Called by `http::guard`, `scheduler`, `agent_api` and
//! `app`; started by `serve`. Knows no routes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use opentelemetry::{
    Context, InstrumentationScope, Key, KeyValue,
    propagation::TextMapPropagator as _,
    trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState},
};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{
        BatchSpanProcessor, IdGenerator as _, RandomIdGenerator, SpanData, SpanEvents, SpanLinks, SpanProcessor as _,
    },
};
use reqwest::header::HeaderMap;

use crate::{
    config,
    domain::{Exit, Job, JobId, JobStatus, Outcome, attempt::EXIT_TEMPFAIL},
    store::Attempt,
};

/// What the settings leave to these, in this order.
const VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
/// Longest that one request to the collector may take, and one batch with its retries.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that the end of the server waits for the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// So much of a collector's answer is read.
const ANSWER_BYTES: usize = 64 << 10;
/// Methods that may name a span; clients can make up others.
const METHODS: [&str; 9] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
];

/// Why no traces can be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The endpoint is no address.
    #[error("cannot send traces: the collector's address cannot be used")]
    Endpoint(#[from] ExporterBuildError),
    /// There is no client.
    #[error("cannot make the client that sends traces")]
    Client(#[source] reqwest::Error),
}

/// Where spans go; nowhere by default. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<Arc<BatchSpanProcessor>>);

/// A request that is being answered.
#[derive(Debug)]
pub(crate) struct RequestSpan {
    /// The client's span; not valid if it named none.
    client: SpanContext,
    started: SystemTime,
}

/// What is known of a request when it is answered.
#[derive(Debug)]
pub(crate) struct Answered<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) method: &'a str,
    /// Without the query.
    pub(crate) path: &'a str,
    /// `/jobs/{id}`; `None`: no route, so a file of the dashboard or nothing.
    pub(crate) route: Option<&'a str>,
    pub(crate) status: u16,
    /// The job that it made or was about.
    pub(crate) job: Option<JobId>,
}

impl Traces {
    /// Starts sending if the settings, or for empty ones the environment, name a collector. Needs a runtime.
    ///
    /// # Errors
    /// If the collector's address is none, or the client cannot be made.
    pub fn start(settings: &config::Traces) -> Result<Self, TracesError> {
        let endpoint = match settings.otlp_endpoint.as_str() {
            "off" => return Ok(Self::default()),
            // The exporter reads the variables itself.
            "" if VARIABLES
                .iter()
                .any(|name| std::env::var(name).is_ok_and(|value| !value.is_empty())) =>
            {
                None
            }
            "" => return Ok(Self::default()),
            base => Some(format!("{}/v1/traces", base.trim_end_matches('/'))),
        };
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(SEND_TIMEOUT)
            .with_http_client(Client::new()?);
        if let Some(endpoint) = endpoint {
            exporter = exporter.with_endpoint(endpoint);
        }
        let mut processor = BatchSpanProcessor::builder(exporter.build()?).build();
        processor.set_resource(&resource());
        tracing::info!("traces are sent to a collector");
        Ok(Self(Some(Arc::new(processor))))
    }

    /// Begins a request's span. `None`: nothing is sent, or its client does not want this trace recorded.
    pub(crate) fn request(&self, headers: &HeaderMap) -> Option<RequestSpan> {
        self.0.as_ref()?;
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let client = context.span().span_context().clone();
        (!client.is_valid() || client.is_sampled()).then(|| RequestSpan {
            client,
            started: SystemTime::now(),
        })
    }

    /// Ends a request's span.
    pub(crate) fn answered(&self, span: RequestSpan, answered: &Answered<'_>) {
        let RequestSpan { client, started } = span;
        let is_known = METHODS.contains(&answered.method);
        let method = if is_known { answered.method } else { "_OTHER" };
        let name = if is_known { answered.method } else { "HTTP" };
        let mut attributes = vec![
            KeyValue::new("request.id", answered.request_id.to_owned()),
            KeyValue::new("http.request.method", method.to_owned()),
            KeyValue::new("url.path", answered.path.to_owned()),
            KeyValue::new("http.response.status_code", i64::from(answered.status)),
        ];
        if let Some(route) = answered.route {
            attributes.push(KeyValue::new("http.route", route.to_owned()));
        }
        let mut links = SpanLinks::default();
        if let Some(job) = answered.job {
            attributes.push(KeyValue::new("job.id", job.to_string()));
            links.links.push(Link::with_context(root_of(job)));
        }
        let status = match answered.status {
            500.. => Status::error(""),
            _ => Status::Unset,
        };
        let ids = RandomIdGenerator::default();
        let trace = if client.is_valid() {
            client.trace_id()
        } else {
            ids.new_trace_id()
        };
        self.send(SpanData {
            span_context: sampled(trace, ids.new_span_id(), client.trace_state().clone()),
            parent_span_id: client.span_id(),
            parent_span_is_remote: true,
            span_kind: SpanKind::Server,
            links,
            ..span_data(
                match answered.route {
                    Some(route) => format!("{name} {route}"),
                    None => name.to_owned(),
                },
                (started, SystemTime::now()),
                attributes,
                status,
            )
        });
    }

    /// A worker process has ended.
    pub(crate) fn attempt(&self, attempt: &Attempt, job: &Job, exit: &Exit, outcome: &Outcome) {
        if self.0.is_none() {
            return;
        }
        let outcome = match outcome {
            Outcome::Settled => "settled",
            Outcome::Requeue { .. } => "requeue",
            Outcome::Shrink { .. } => "shrink",
            Outcome::Fail(_) => "fail",
            Outcome::Cancel => "cancel",
        };
        let status = match exit {
            Exit::Code(0 | EXIT_TEMPFAIL) => Status::Unset,
            exit => Status::error(exit.to_string()),
        };
        let attributes = vec![
            KeyValue::new("job.id", attempt.job_id.to_string()),
            KeyValue::new("job.attempt", i64::from(attempt.attempt)),
            KeyValue::new("job.family", job.family.clone()),
            KeyValue::new("job.device", attempt.device.clone()),
            KeyValue::new("job.exit", exit.to_string()),
            KeyValue::new("job.outcome", outcome),
        ];
        let root = root_of(attempt.job_id);
        self.send(SpanData {
            span_context: sampled(
                root.trace_id(),
                RandomIdGenerator::default().new_span_id(),
                TraceState::NONE,
            ),
            parent_span_id: root.span_id(),
            ..span_data(
                "attempt".to_owned(),
                (at(attempt.started_at_ms), SystemTime::now()),
                attributes,
                status,
            )
        });
    }

    /// A job became final. To be called once.
    pub(crate) fn job(&self, job: &Job) {
        if self.0.is_none() {
            return;
        }
        let mut attributes = vec![
            KeyValue::new("job.id", job.id.to_string()),
            KeyValue::new("job.attempt", i64::from(job.attempt)),
            KeyValue::new("job.family", job.family.clone()),
            KeyValue::new("job.status", job.status.as_str()),
            KeyValue::new("job.step", i64::try_from(job.step).unwrap_or(i64::MAX)),
        ];
        let status = match &job.error {
            Some(problem) if job.status == JobStatus::Failed => {
                attributes.push(KeyValue::new("error.type", problem.code.clone()));
                Status::error(problem.title.clone())
            }
            _ => Status::Unset,
        };
        let ended = job.finished_at_ms.map_or_else(SystemTime::now, at);
        self.send(SpanData {
            span_context: root_of(job.id),
            ..span_data("job".to_owned(), (at(job.created_at_ms), ended), attributes, status)
        });
    }

    /// Sends what waits, for at most two seconds, and ends.
    pub(crate) async fn shutdown(&self) {
        let Some(processor) = self.0.clone() else { return };
        let flushed = tokio::task::spawn_blocking(move || processor.shutdown_with_timeout(FLUSH_TIMEOUT)).await;
        if let Ok(Err(error)) = flushed {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }

    fn send(&self, span: SpanData) {
        if let Some(processor) = &self.0 {
            processor.on_end(span);
        }
    }
}

/// The span of a job, the root of its trace, known from the job's id alone. The last eight bytes of a UUID are not all zero:
/// they begin with its variant.
fn root_of(job: JobId) -> SpanContext {
    let bytes = job.to_bytes();
    let [.., a, b, c, d, e, f, g, h] = bytes;
    sampled(
        TraceId::from_bytes(bytes),
        SpanId::from_bytes([a, b, c, d, e, f, g, h]),
        TraceState::NONE,
    )
}

fn sampled(trace: TraceId, span: SpanId, state: TraceState) -> SpanContext {
    SpanContext::new(trace, span, TraceFlags::SAMPLED, false, state)
}

/// A span without parent and links, whose context is to be filled in.
fn span_data(
    name: String,
    (start_time, end_time): (SystemTime, SystemTime),
    attributes: Vec<KeyValue>,
    status: Status,
) -> SpanData {
    SpanData {
        span_context: SpanContext::NONE,
        parent_span_id: SpanId::INVALID,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time,
        end_time,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status,
        instrumentation_scope: InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    }
}

fn at(t_ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(t_ms).unwrap_or(0))
}

/// This server, as OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES call it, or else `lorad`.
fn resource() -> Resource {
    const NAME: &str = "service.name";
    let is_named = Resource::builder()
        .build()
        .get(&Key::from_static_str(NAME))
        .is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let builder = Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    if is_named {
        builder.build()
    } else {
        builder.with_service_name(env!("CARGO_PKG_NAME")).build()
    }
}

/// Sends on the server's runtime: the SDK's thread has none.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    runtime: tokio::runtime::Handle,
    /// Whether the newest request failed.
    is_down: AtomicBool,
}

impl Client {
    fn new() -> Result<Self, TracesError> {
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("lorad/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .timeout(SEND_TIMEOUT)
        };
        let http = builder().build().or_else(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no certificates on this machine (ca-certificates): traces over https will fail"
            );
            builder().tls_certs_only([]).build()
        });
        Ok(Self {
            http: http.map_err(TracesError::Client)?,
            runtime: tokio::runtime::Handle::current(),
            is_down: AtomicBool::new(false),
        })
    }

    /// Says when the collector fails and when it is back, once each.
    fn tell(&self, answer: &Result<Response<Bytes>, HttpError>) {
        const LOST: &str = "the collector does not take traces: they are lost until it does";
        let is_down = !answer.as_ref().is_ok_and(|answer| answer.status().is_success());
        if self.is_down.swap(is_down, Ordering::Relaxed) == is_down {
            return;
        }
        match answer {
            Ok(_) if !is_down => tracing::info!("the collector takes traces again"),
            Ok(answer) => tracing::warn!(status = answer.status().as_u16(), "{LOST}"),
            Err(error) => tracing::warn!(error = error.as_ref() as &dyn std::error::Error, "{LOST}"),
        }
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.runtime.spawn(post(self.http.clone(), request)).await;
        let answer = sent.unwrap_or_else(|gone| Err(gone.into()));
        self.tell(&answer);
        answer
    }
}

async fn post(http: reqwest::Client, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let request = request.try_into()?;
    let mut answer = http.execute(request).await.map_err(reqwest::Error::without_url)?;
    let mut body = Vec::new();
    while body.len() < ANSWER_BYTES
        && let Some(part) = answer.chunk().await?
    {
        body.extend_from_slice(&part);
    }
    let mut response = Response::builder().status(answer.status()).body(body.into())?;
    std::mem::swap(response.headers_mut(), answer.headers_mut());
    Ok(response)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_the_trace_of_its_own_digits() {
        let job: JobId = "job_0193a5c1b2d37e4f8a5b6c7d8e9fa0b1".parse().unwrap();
        let root = root_of(job);
        assert_eq!(root.trace_id().to_string(), "0193a5c1b2d37e4f8a5b6c7d8e9fa0b1");
        assert_eq!(root.span_id().to_string(), "8a5b6c7d8e9fa0b1");
        assert!(root.is_valid() && root.is_sampled());
    }

    #[tokio::test]
    async fn without_a_collector_nothing_is_begun() {
        let settings = config::Traces {
            otlp_endpoint: "off".to_owned(),
        };
        let traces = Traces::start(&settings).unwrap();
        assert!(traces.request(&HeaderMap::new()).is_none());
        traces.shutdown().await;
    }
}
