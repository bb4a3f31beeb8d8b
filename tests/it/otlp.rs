//! Traces: what a collector gets of requests, attempts and jobs, and that a collector that is down or mute hurts nobody.

use std::{
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{Router, body::Bytes, http::HeaderMap, routing::post};
use lorad::domain::{CancelMode, JobId, JobStatus};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message as _;
use serde_json::json;

use crate::server::{PATIENCE, TestServer};

/// A collector that keeps what it gets.
struct Collector {
    address: String,
    got: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Collector {
    async fn on(address: &str) -> Self {
        let got = Arc::new(Mutex::new(Vec::new()));
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let kept = Arc::clone(&got);
        let take = async move |headers: HeaderMap, body: Bytes| {
            assert_eq!(headers["content-type"], "application/x-protobuf");
            let request = ExportTraceServiceRequest::decode(body).unwrap();
            kept.lock().unwrap().push(request);
        };
        let router = Router::new().route("/v1/traces", post(take));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, got, task }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn spans(&self) -> Vec<Span> {
        let got = self.got.lock().unwrap();
        let of_resources = got.iter().flat_map(|request| &request.resource_spans);
        let of_scopes = of_resources.flat_map(|spans| &spans.scope_spans);
        of_scopes.flat_map(|spans| spans.spans.clone()).collect()
    }

    async fn wait(&self, what: &str, until: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let start = Instant::now();
        loop {
            let spans = self.spans();
            if until(&spans) {
                return spans;
            }
            assert!(start.elapsed() < PATIENCE, "{what} did not come: {spans:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn get(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(n) => n.to_string(),
        other => panic!("{key}: {other:?}"),
    })
}

fn attribute(span: &Span, key: &str) -> String {
    get(&span.attributes, key).unwrap_or_default()
}

fn status(span: &Span) -> StatusCode {
    span.status
        .as_ref()
        .map_or(StatusCode::Unset, opentelemetry_proto::tonic::trace::v1::Status::code)
}

/// The trace of a job: its id's digits.
fn trace_of(job: JobId) -> String {
    job.to_string().trim_start_matches("job_").to_owned()
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_requests_attempts_and_jobs_with_the_ids_of_the_logs() {
    let collector = Collector::on("127.0.0.1:0").await;
    let server = TestServer::with(&[("traces.otlp_endpoint", &collector.url())]).await;
    let job = server.post(json!({"steps": 5, "step_ms": 1})).await;
    server.ended(job.id).await;
    server.idle().await;
    let http = client();
    let ask = async |path: &str, traceparent: &str| {
        let request = http.get(server.url(path)).header("traceparent", traceparent);
        let answer = request.send().await.unwrap();
        answer.headers()["x-request-id"].to_str().unwrap().to_owned()
    };
    let path = format!("/jobs/{}", job.id);
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let unwanted = ask("/version", &format!("00-{trace}-{parent}-00")).await;
    let lost = ask("/nowhere", "nonsense").await;
    let wanted = ask(&path, &format!("00-{trace}-{parent}-01")).await;

    // By itself, not only when the server ends.
    let has = |spans: &[Span], id: &str| spans.iter().any(|span| attribute(span, "request.id") == id);
    collector.wait("the request", |spans| has(spans, &wanted)).await;
    server.handle.shutdown().await;
    let spans = collector.spans();

    let only = |key: &str, value: &str, name: &str| {
        let found: Vec<&Span> = spans
            .iter()
            .filter(|span| attribute(span, key) == value && (span.name == name || name.is_empty()))
            .collect();
        assert_eq!(found.len(), 1, "{key} = {value}: {spans:#?}");
        found[0]
    };
    let request = only("request.id", &wanted, "");
    assert_eq!(
        (request.name.as_str(), request.kind()),
        ("GET /jobs/{id}", SpanKind::Server)
    );
    assert_eq!(
        (hex::encode(&request.trace_id), hex::encode(&request.parent_span_id)),
        (trace.to_owned(), parent.to_owned())
    );
    for (key, value) in [
        ("http.request.method", "GET"),
        ("http.route", "/jobs/{id}"),
        ("http.response.status_code", "200"),
        ("url.path", &path),
        ("job.id", &job.id.to_string()),
    ] {
        assert_eq!(attribute(request, key), value, "{key}");
    }
    assert_eq!(hex::encode(&request.links[0].trace_id), trace_of(job.id));

    let lost = only("request.id", &lost, "GET");
    assert_eq!(
        (attribute(lost, "http.response.status_code").as_str(), status(lost)),
        ("404", StatusCode::Unset)
    );
    assert!(lost.parent_span_id.is_empty() && lost.trace_id != request.trace_id && lost.links.is_empty());
    assert!(!has(&spans, &unwanted), "its client did not want it recorded");

    let id = job.id.to_string();
    let whole = only("job.id", &id, "job");
    assert_eq!(hex::encode(&whole.trace_id), trace_of(job.id));
    assert!(whole.parent_span_id.is_empty());
    assert_eq!(whole.span_id, request.links[0].span_id);
    assert_eq!(
        ["job.status", "job.step", "job.attempt"].map(|key| attribute(whole, key)),
        ["succeeded", "5", "1"]
    );
    let attempt = only("job.id", &id, "attempt");
    assert_eq!(
        (&attempt.trace_id, &attempt.parent_span_id),
        (&whole.trace_id, &whole.span_id)
    );
    assert_eq!(
        ["job.attempt", "job.family", "job.device", "job.exit"].map(|key| attribute(attempt, key)),
        ["1", "scripted", "cpu", "exit code 0"]
    );
    assert_eq!((status(whole), status(attempt)), (StatusCode::Unset, StatusCode::Unset));
    assert!(whole.start_time_unix_nano <= attempt.start_time_unix_nano);
    assert!(attempt.start_time_unix_nano < attempt.end_time_unix_nano);

    let got = collector.got.lock().unwrap();
    let resource = got[0].resource_spans[0].resource.as_ref().unwrap();
    assert_eq!(get(&resource.attributes, "service.name").as_deref(), Some("lorad"));
}

#[tokio::test(flavor = "multi_thread")]
async fn however_a_job_ends_its_trace_has_one_root_and_all_its_attempts() {
    let collector = Collector::on("127.0.0.1:0").await;
    let server = TestServer::with(&[("traces.otlp_endpoint", &collector.url())]).await;
    // Status, error.type, and how each attempt's worker ended.
    let mut wanted: Vec<(JobId, JobStatus, &str, Vec<&str>)> = Vec::new();
    let abort = "signal 6 (SIGABRT)";
    for (script, status, error, exits) in [
        (
            json!({"steps": 3, "step_ms": 1}),
            JobStatus::Succeeded,
            "",
            vec!["exit code 0"],
        ),
        (
            json!({"steps": 9, "step_ms": 1, "fail": 3}),
            JobStatus::Failed,
            "loss.not_finite",
            vec!["exit code 3"],
        ),
        (
            json!({"steps": 9, "step_ms": 1, "abort": 3}),
            JobStatus::Failed,
            "worker.killed",
            vec![abort; 3],
        ),
        (
            json!({"steps": 3, "step_ms": 1, "spoil": true}),
            JobStatus::Failed,
            "results.unusable",
            vec!["exit code 0"],
        ),
    ] {
        let job = server.post(script).await;
        server.ended(job.id).await;
        wanted.push((job.id, status, error, exits));
    }
    let endless = json!({"steps": 100_000, "step_ms": 5});
    let running = server.post(endless.clone()).await;
    let waiting = server.post(endless.clone()).await;
    server.wait(running.id, "training", |job| job.step >= 2).await;
    for job in [waiting.id, running.id] {
        server.handle.app().cancel_job(job, CancelMode::Discard).await.unwrap();
        server.ended(job).await;
    }
    let forced = server.post(endless).await;
    server.wait(forced.id, "training", |job| job.step >= 2).await;
    server
        .handle
        .app()
        .cancel_job(forced.id, CancelMode::Force)
        .await
        .unwrap();
    server.ended(forced.id).await;
    server.idle().await;
    wanted.push((waiting.id, JobStatus::Cancelled, "", vec![]));
    wanted.push((running.id, JobStatus::Cancelled, "", vec!["exit code 0"]));
    wanted.push((forced.id, JobStatus::Cancelled, "", vec!["signal 9 (SIGKILL)"]));

    let n_spans = wanted.iter().map(|(_, _, _, exits)| 1 + exits.len()).sum();
    collector.wait("every span", |spans| spans.len() >= n_spans).await;
    server.handle.shutdown().await;
    let spans = collector.spans();
    assert_eq!(spans.len(), n_spans, "{spans:#?}");
    for (job, job_status, error, exits) in wanted {
        let of_job: Vec<&Span> = spans
            .iter()
            .filter(|span| hex::encode(&span.trace_id) == trace_of(job))
            .collect();
        let (roots, attempts): (Vec<&Span>, Vec<&Span>) = of_job.into_iter().partition(|span| span.name == "job");
        let [root] = roots[..] else {
            panic!("{job_status} {error}: {} roots", roots.len())
        };
        assert_eq!(attribute(root, "job.status"), job_status.as_str());
        assert_eq!(attribute(root, "error.type"), error);
        assert_eq!(status(root) == StatusCode::Error, job_status == JobStatus::Failed);
        let ended: Vec<String> = attempts.iter().map(|span| attribute(span, "job.exit")).collect();
        assert_eq!(ended, exits, "{job_status} {error}");
        for (n, attempt) in (1..).zip(&attempts) {
            assert_eq!(attribute(attempt, "job.attempt"), format!("{n}"));
            assert_eq!(attempt.parent_span_id, root.span_id);
            let is_error = attribute(attempt, "job.exit") != "exit code 0";
            assert_eq!(status(attempt) == StatusCode::Error, is_error, "{attempt:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_down_costs_one_warning_and_is_taken_up_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody listens there any more.
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let log = dir.path().join("log");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lorad"))
        .args(["serve", "--bind", "127.0.0.1:0"])
        .env("LORAD_STORAGE__DATA_DIR", dir.path().join("data"))
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{gone}"))
        .env("OTEL_BSP_SCHEDULE_DELAY", "20")
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut url = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut url).unwrap();
    let (http, url) = (client(), format!("{}/version", url.trim()));
    let said = |part: &str| {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().filter(|line| line.contains(part)).count()
    };
    let ask = async || assert_eq!(http.get(&url).send().await.unwrap().status(), 200);
    let start = Instant::now();
    while said("the collector does not take traces") == 0 {
        ask().await;
        assert!(start.elapsed() < PATIENCE, "nobody is told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Each batch is tried four times within a second or so: many failures, one line.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        ask().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(said("the collector does not take traces"), 1);

    let collector = Collector::on(&gone.to_string()).await;
    while collector.spans().is_empty() || said("the collector takes traces again") == 0 {
        ask().await;
        assert!(start.elapsed() < PATIENCE, "the collector is not taken up again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(said("the collector does not take traces"), 1);
    crate::server::signal(child.id(), rustix::process::Signal::TERM);
    assert!(child.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_holds_up_neither_requests_nor_jobs_nor_the_end() {
    // Connections are taken by the system, and nothing else happens.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", mute.local_addr().unwrap());
    let server = TestServer::with(&[("traces.otlp_endpoint", &url)]).await;
    // More than its queue holds.
    let http = client();
    let livez = server.url("/livez");
    let asks = (0..16).map(|_| {
        let (http, livez) = (http.clone(), livez.clone());
        tokio::spawn(async move {
            for _ in 0..200 {
                assert_eq!(http.get(&livez).send().await.unwrap().status(), 200);
            }
        })
    });
    for asked in asks.collect::<Vec<_>>() {
        tokio::time::timeout(PATIENCE, asked).await.unwrap().unwrap();
    }
    let job = server.post(json!({"steps": 5, "step_ms": 1})).await;
    assert_eq!(server.ended(job.id).await.status, JobStatus::Succeeded);
    server.idle().await;
    let start = Instant::now();
    server.handle.shutdown().await;
    let took = start.elapsed();
    println!("the end took {took:?}");
    // One batch alone waits ten seconds for its answer.
    assert!(took < Duration::from_secs(8), "{took:?}");
    drop(mute);
}
