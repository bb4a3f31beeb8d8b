//! Webhooks: what a receiver gets and can verify, what happens when it fails, where no call may go, and that none is lost.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use lorad::{domain::DeliveryStatus, store::Store};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    client::{Client, demo_job},
    server::{PATIENCE, ServerProcess, furnish, scripted_job, settings, wait},
};

/// Settings under which a receiver on this machine may be called.
const LOCAL: [(&str, &str); 3] = [
    ("webhooks.allow_private", "127.0.0.0/8"),
    ("webhooks.allow_http", "true"),
    ("webhooks.poll_ms", "50"),
];

#[derive(Debug, Clone)]
struct Message {
    headers: HeaderMap,
    body: Bytes,
}

impl Message {
    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn kind(&self) -> String {
        self.json()["type"].as_str().unwrap().to_owned()
    }

    /// As the standard says, with an HMAC written out from RFC 2104, not the server's.
    fn is_signed_by(&self, secret: &str) -> bool {
        let key = BASE64.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let pad = |byte: u8| {
            let mut block = [byte; 64];
            key.iter().zip(&mut block).for_each(|(k, b)| *b ^= k);
            block
        };
        let inner = Sha256::new()
            .chain_update(pad(0x36))
            .chain_update(self.header("webhook-id"))
            .chain_update(".")
            .chain_update(self.header("webhook-timestamp"))
            .chain_update(".")
            .chain_update(&self.body)
            .finalize();
        let outer = Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize();
        self.header("webhook-signature") == format!("v1,{}", BASE64.encode(outer))
    }
}

/// A receiver that answers the n-th request as it is told, and keeps what it got.
struct Receiver {
    address: String,
    seen: Arc<Mutex<Vec<Message>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Receiver {
    async fn start(answer: impl Fn(usize) -> Response + Clone + Send + Sync + 'static) -> Self {
        Self::on("127.0.0.1:0", answer).await
    }

    async fn on(address: &str, answer: impl Fn(usize) -> Response + Clone + Send + Sync + 'static) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (kept, n) = (Arc::clone(&seen), Arc::new(AtomicUsize::new(0)));
        let router = Router::new().fallback(move |headers: HeaderMap, body: Bytes| {
            kept.lock().unwrap().push(Message { headers, body });
            let answer = answer(n.fetch_add(1, Ordering::SeqCst));
            async move { answer }
        });
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, seen, task }
    }

    fn url(&self) -> String {
        format!("http://{}/hook?token=secret", self.address)
    }

    fn seen(&self) -> Vec<Message> {
        self.seen.lock().unwrap().clone()
    }

    async fn wait(&self, what: &str, until: impl Fn(&[Message]) -> bool) -> Vec<Message> {
        let start = Instant::now();
        loop {
            let seen = self.seen();
            if until(&seen) {
                return seen;
            }
            assert!(start.elapsed() < PATIENCE, "{what} did not come: {seen:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn ok(_: usize) -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// `POST /webhooks`.
async fn hook(client: &Client, url: &str, events: &[&str]) -> Value {
    let (status, body) = client.post("/webhooks", &json!({"url": url, "events": events})).await;
    assert_eq!(status, 201, "{body:#}");
    body
}

/// Waits until the newest delivery has this status.
async fn delivery(client: &Client, hook: &Value, status: &str) -> Value {
    let start = Instant::now();
    loop {
        let log = client
            .json(&format!("/webhooks/{}/deliveries", hook["id"].as_str().unwrap()))
            .await;
        let newest = &log["data"][0];
        if newest["status"] == status {
            return newest.clone();
        }
        assert!(start.elapsed() < PATIENCE, "not {status}: {newest:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn test_message(client: &Client, hook: &Value) {
    let path = format!("/webhooks/{}/test", hook["id"].as_str().unwrap());
    let (status, body) = client.post(&path, &json!({})).await;
    assert_eq!((status, &body["status"]), (202, &json!("pending")), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_can_verify_what_it_gets_and_the_log_shows_it() {
    let client = Client::start_with(&LOCAL).await;
    let (all, own) = (Receiver::start(ok).await, Receiver::start(ok).await);
    let made = hook(&client, &all.url(), &["job.created", "job.started", "job.succeeded"]).await;
    let secret = made["secret"].as_str().unwrap();
    let mut job = demo_job(&client).await;
    job["webhook"] = json!({"url": own.url()});
    let (status, job) = client.post("/jobs", &job).await;
    assert_eq!(status, 201, "{job:#}");
    let id = job["id"].as_str().unwrap();

    let seen = all.wait("the end", |seen| seen.len() == 3).await;
    for message in &seen {
        assert!(message.is_signed_by(secret), "{message:?}");
        assert!(
            !message.is_signed_by(&BASE64.encode([7; 32]).replacen("", "whsec_", 1)),
            "anything is signed"
        );
        assert_eq!(message.header("content-type"), "application/json");
        let age_s = lorad::domain::now_ms() / 1000 - message.header("webhook-timestamp").parse::<i64>().unwrap();
        assert!((-5..300).contains(&age_s), "{age_s}");
        assert_eq!(message.json()["data"]["job_id"], id);
    }
    let mut kinds: Vec<String> = seen.iter().map(Message::kind).collect();
    kinds.sort();
    assert_eq!(kinds, ["job.created", "job.started", "job.succeeded"]);
    let end = seen
        .iter()
        .find(|message| message.kind() == "job.succeeded")
        .unwrap()
        .json();
    assert_eq!(
        (&end["data"]["status"], &end["data"]["step"]),
        (&json!("succeeded"), &json!(4)),
        "{end:#}"
    );
    let log = delivery(&client, &made, "delivered").await;
    assert_eq!(
        (&log["attempts"][0]["http_status"], &log["attempts"][0]["error"]),
        (&json!(204), &Value::Null),
        "{log:#}"
    );
    assert_eq!(
        client.json("/webhooks").await["data"][0].get("secret"),
        None,
        "shown once"
    );

    // The job's own hears of the end alone, and whoever may submit reads its secret.
    let own_hook = client.json(&format!("/jobs/{id}/webhook")).await;
    let seen = own.wait("the end", |seen| seen.len() == 1).await;
    assert_eq!(seen[0].kind(), "job.succeeded");
    assert!(seen[0].is_signed_by(own_hook["secret"].as_str().unwrap()));
    assert_eq!(
        client.json("/webhooks").await["data"].as_array().unwrap().len(),
        1,
        "a job's own is not listed"
    );
    let (status, body) = client
        .post(
            "/jobs?dry_run=true",
            &json!({"webhook": {"url": "ftp://x", "events": ["job.done"], "secret": "s", "x": 1}}),
        )
        .await;
    assert_eq!(status, 422);
    let at: Vec<&str> = body["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["pointer"].as_str().unwrap())
        .collect();
    for pointer in ["/webhook/url", "/webhook/events/0", "/webhook/secret", "/webhook/x"] {
        assert!(at.contains(&pointer), "{pointer} is not in {at:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_receiver_is_tried_again_given_up_and_can_be_sent_to_again() {
    let mut settings = LOCAL.to_vec();
    settings.push(("webhooks.retry_after_ms", "20,20"));
    let client = Client::start_with(&settings).await;
    let twice = |n: usize| {
        if n < 2 {
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        } else {
            ok(n)
        }
    };
    let receiver = Receiver::start(twice).await;
    let made = hook(&client, &receiver.url(), &["job.failed"]).await;
    test_message(&client, &made).await;
    let log = delivery(&client, &made, "delivered").await;
    let statuses: Vec<&Value> = log["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| &a["http_status"])
        .collect();
    assert_eq!(statuses, [503, 503, 204], "{log:#}");
    let seen = receiver.seen();
    assert!(
        seen.iter().all(|message| message.header("webhook-id") == log["id"]),
        "one message has one id"
    );
    assert_eq!(seen.len(), 3);

    let five = Receiver::start(|n: usize| {
        if n < 3 {
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        } else {
            ok(n)
        }
    })
    .await;
    let made = hook(&client, &five.url(), &["job.failed"]).await;
    test_message(&client, &made).await;
    let log = delivery(&client, &made, "failed").await;
    assert_eq!(log["attempts"].as_array().unwrap().len(), 3, "{log:#}");
    let at = format!("/webhooks/{}", made["id"].as_str().unwrap());
    assert!(client.json(&at).await["failing_since"].is_string());
    let (status, _) = client
        .post(
            &format!("{at}/deliveries/{}/redeliver", log["id"].as_str().unwrap()),
            &json!({}),
        )
        .await;
    assert_eq!(status, 202);
    let again = delivery(&client, &made, "delivered").await;
    assert_eq!(
        (&again["id"], again["attempts"].as_array().unwrap().len()),
        (&log["id"], 4)
    );
    assert!(client.json(&at).await["failing_since"].is_null());

    // Gone for good: switched off at once, and on again by hand.
    let gone = Receiver::start(|_| StatusCode::GONE.into_response()).await;
    let made = hook(&client, &gone.url(), &["job.failed"]).await;
    test_message(&client, &made).await;
    delivery(&client, &made, "failed").await;
    let at = format!("/webhooks/{}", made["id"].as_str().unwrap());
    let off = client.json(&at).await;
    assert_eq!(off["enabled"], false);
    assert!(off["disabled_reason"].as_str().unwrap().contains("410"), "{off:#}");
    let on = client
        .http
        .patch(client.url(&at))
        .json(&json!({"enabled": true}))
        .send()
        .await
        .unwrap();
    assert_eq!(on.json::<Value>().await.unwrap()["disabled_reason"], Value::Null);
    assert_eq!(client.http.delete(client.url(&at)).send().await.unwrap().status(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_a_failure_and_leads_nowhere() {
    let mut settings = LOCAL.to_vec();
    settings.push(("webhooks.retry_after_ms", ""));
    let client = Client::start_with(&settings).await;
    let target = Receiver::start(ok).await;
    let to = target.url();
    for code in [
        StatusCode::FOUND,
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ] {
        let to = to.clone();
        let sender = Receiver::start(move |_| (code, [(header::LOCATION, to.clone())]).into_response()).await;
        let made = hook(&client, &sender.url(), &["job.failed"]).await;
        test_message(&client, &made).await;
        let log = delivery(&client, &made, "failed").await;
        assert!(
            log["attempts"][0]["error"]
                .as_str()
                .unwrap()
                .contains("redirects are not followed"),
            "{log:#}"
        );
    }
    assert!(target.seen().is_empty(), "a redirect was followed");
}

#[tokio::test(flavor = "multi_thread")]
async fn private_addresses_are_refused_when_written_down_and_when_a_name_leads_there() {
    let client = Client::start_with(&[("webhooks.poll_ms", "50"), ("webhooks.retry_after_ms", "")]).await;
    for (url, part) in [
        ("https://127.0.0.1/", "not public"),
        ("https://2130706433/", "not public"),
        ("https://[::ffff:10.0.0.1]/", "not public"),
        ("https://169.254.169.254/latest/meta-data", "not public"),
        ("http://example.com/", "https"),
        ("https://me:pw@example.com/", "password"),
        ("nonsense", "not an address"),
    ] {
        let (status, body) = client.post("/webhooks", &json!({"url": url})).await;
        assert_eq!(
            (status, &body["errors"][0]["pointer"]),
            (422, &json!("/url")),
            "{url}: {body:#}"
        );
        assert!(
            body["errors"][0]["detail"].as_str().unwrap().contains(part),
            "{url}: {body:#}"
        );
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "https://localhost:{}/token-in-the-path",
        listener.local_addr().unwrap().port()
    );
    let made = hook(&client, &url, &["job.failed"]).await;
    test_message(&client, &made).await;
    let log = delivery(&client, &made, "failed").await;
    let error = log["attempts"][0]["error"].as_str().unwrap();
    assert!(error.contains("is not public") && !error.contains("token"), "{log:#}");
    let knock = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(knock.is_err(), "somebody connected");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_survives_a_crash_between_the_change_and_its_delivery() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(ok).await;
    // The first server never comes to send: what it stores is all that is left of the event.
    let mut slow = settings(dir.path(), &LOCAL[..2]);
    slow.push(("webhooks.poll_ms", "3600000".to_owned()));
    let server = ServerProcess::start(dir.path(), &slow).await;
    let store = Store::open(&dir.path().join("data/lorad.sqlite3")).await.unwrap();
    let dataset = furnish(&store).await;
    let post = reqwest::Client::builder()
        .no_proxy()
        .build()
        .unwrap()
        .post(format!("http://{}/webhooks", server.address));
    let made: Value = post
        .json(&json!({"url": receiver.url()}))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let job = store
        .insert_job(&scripted_job(dataset, &json!({"steps": 5, "step_ms": 1})), None)
        .await
        .unwrap();
    wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    server.kill();
    assert!(receiver.seen().is_empty());

    let server = ServerProcess::start(dir.path(), &settings(dir.path(), &LOCAL)).await;
    let seen = receiver
        .wait("the event of the dead server", |seen| !seen.is_empty())
        .await;
    assert_eq!(
        (seen[0].kind().as_str(), &seen[0].json()["data"]["job_id"]),
        ("job.succeeded", &json!(job.id))
    );
    assert!(seen[0].is_signed_by(made["secret"].as_str().unwrap()));
    let hook = made["id"].as_str().unwrap().parse().unwrap();
    let start = Instant::now();
    while store.deliveries(hook, None, 10).await.unwrap().0[0].status != DeliveryStatus::Delivered {
        assert!(start.elapsed() < PATIENCE, "the delivery is not settled");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(receiver.seen().len(), 1, "once is enough");
    server.kill();
}
