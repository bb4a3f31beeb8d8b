//! What one key may use: requests, jobs that wait, jobs at work, bytes; and how it is told.

use std::time::Instant;

use lorad::domain::{JobStatus, Quota, Scope};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::{
    access::{bearer, key_with},
    client::Client,
    corpus::{pictures, zip},
    server::{PATIENCE, TestServer, scripted_job},
};

fn quota() -> Quota {
    Quota::default()
}

/// Asks until it is refused for asking too often; the bucket fills only slowly, so that is soon, on any machine.
async fn until_refused(mut ask: impl AsyncFnMut() -> reqwest::Response) -> (usize, reqwest::Response) {
    for n in 0..1000 {
        let response = ask().await;
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            return (n, response);
        }
    }
    panic!("never refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_often_is_told_when_to_come_back_and_others_are_not_held_up() {
    let client = Client::start_with(&[("limits.requests_per_minute", "30")]).await;
    let open = async || client.http.get(client.url("/jobs")).send().await.unwrap();
    let (n, refused) = until_refused(open).await;
    assert!(n >= 30, "refused after {n}");
    let header = |response: &reqwest::Response, name: &str| -> u64 {
        response.headers()[name].to_str().unwrap().parse().unwrap()
    };
    assert_eq!(
        (
            header(&refused, "ratelimit-limit"),
            header(&refused, "ratelimit-remaining")
        ),
        (30, 0)
    );
    assert!((1..=2).contains(&header(&refused, "retry-after")));
    assert!(header(&refused, "ratelimit-reset") <= 60);
    assert_eq!(refused.headers()["content-type"], "application/problem+json");
    assert_eq!(refused.json::<Value>().await.unwrap()["code"], "rate.limited");
    for free in ["/livez", "/readyz", "/", "/js/main.js"] {
        assert_eq!(
            client.http.get(client.url(free)).send().await.unwrap().status(),
            200,
            "{free}"
        );
    }

    // Keys have buckets of their own, as large as they are told.
    let slow = key_with(
        &client,
        Scope::Read,
        None,
        Quota {
            requests_per_minute: Some(2),
            ..quota()
        },
    )
    .await;
    let fast = key_with(
        &client,
        Scope::Read,
        None,
        Quota {
            requests_per_minute: Some(1000),
            ..quota()
        },
    )
    .await;
    let with = async |authorization: &str| {
        client
            .http
            .get(client.url("/jobs"))
            .header("authorization", authorization)
            .send()
            .await
            .unwrap()
    };
    let slow = bearer(&slow);
    let (n, refused) = until_refused(async || with(&slow).await).await;
    assert!(n >= 2);
    assert_eq!(header(&refused, "ratelimit-limit"), 2);
    let other = with(&bearer(&fast)).await;
    assert_eq!(
        (other.status().as_u16(), header(&other, "ratelimit-limit")),
        (200, 1000)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_keys_is_stopped_long_before_anything_is_found() {
    let client = Client::start().await;
    key_with(&client, Scope::Read, None, quota()).await;
    let guess = async || {
        let text = lorad::secret::Key::random().unwrap();
        client
            .http
            .get(client.url("/jobs"))
            .header("authorization", bearer(&text))
            .send()
            .await
            .unwrap()
    };
    let (n, refused) = until_refused(guess).await;
    assert!(n < 500, "{n} guesses");
    assert!(refused.headers().contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_no_more_waiting_jobs_and_bytes_than_it_may() {
    let client = Client::start_with(&[("scheduler.tick_ms", "60000")]).await;
    let small = key_with(
        &client,
        Scope::Submit,
        None,
        Quota {
            queued_jobs: Some(1),
            dataset_bytes: Some(1500),
            ..quota()
        },
    )
    .await;
    let large = key_with(&client, Scope::Submit, None, quota()).await;
    let post = async |authorization: String, job: &Value| {
        let request = client
            .http
            .post(client.url("/jobs"))
            .header("authorization", authorization)
            .json(job);
        let response = request.send().await.unwrap();
        (
            response.status().as_u16(),
            response.headers().get("retry-after").is_some(),
            response.json::<Value>().await.unwrap(),
        )
    };
    // The device is taken, so that everything else waits.
    let mut job: Value = client
        .http
        .get(client.url("/demo"))
        .header("authorization", bearer(&large))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    job["hyperparameters"] = json!({"max_train_steps": 100_000, "batch_size": 1});
    job["sampling"] = json!({"prompts": []});
    let (status, _, running) = post(bearer(&large), &job).await;
    assert_eq!(status, 201, "{running}");
    let id: lorad::domain::JobId = running["id"].as_str().unwrap().parse().unwrap();
    crate::server::wait(client.store(), id, "a worker", |job| job.status != JobStatus::Queued).await;

    assert_eq!(post(bearer(&small), &job).await.0, 201);
    let (status, retry_after, body) = post(bearer(&small), &job).await;
    assert_eq!(
        (status, retry_after, &body["code"]),
        (429, true, &json!("quota.exceeded")),
        "{body}"
    );
    assert!(body["detail"].as_str().unwrap().contains("may have 1"), "{body}");
    assert_eq!(post(bearer(&large), &job).await.0, 201, "another's queue");

    let upload = async |n: u32| {
        let file = reqwest::multipart::Part::bytes(zip(&pictures(n))).file_name("a.zip");
        let form = reqwest::multipart::Form::new().part("file", file);
        let request = client
            .http
            .post(client.url("/datasets"))
            .header("authorization", bearer(&small))
            .multipart(form);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let folders = || std::fs::read_dir(client.data().join("datasets")).unwrap().count();
    let (status, first) = upload(1).await;
    assert_eq!(status, 201, "{first}");
    let before = folders();
    let (status, body) = upload(40).await;
    assert_eq!((status, &body["code"]), (429, &json!("quota.exceeded")), "{body}");
    assert_eq!(folders(), before, "a refused upload left its files");
    for job in client
        .store()
        .jobs(&lorad::store::JobFilter {
            limit: 100,
            ..Default::default()
        })
        .await
        .unwrap()
        .data
    {
        client
            .store()
            .request_cancel(job.id, lorad::domain::CancelMode::Force)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_no_more_jobs_at_work_than_it_may_and_the_device_goes_to_another() {
    let server = TestServer::with(&[("scheduler.devices", "cpu,cuda:0")]).await;
    let dataset = server.dataset();
    let make = async |running_jobs: Option<u32>| {
        let key = lorad::secret::Key::random().unwrap();
        let new = lorad::domain::NewApiKey {
            name: "k".to_owned(),
            scope: Scope::Submit,
            prefix: key.prefix().to_owned(),
            sha256: key.sha256(),
            expires_at_ms: None,
            quota: Quota {
                running_jobs,
                ..quota()
            },
        };
        server.store().insert_key(&new).await.unwrap().id
    };
    let (one, free) = (make(Some(1)).await, make(None).await);
    let post = async |owner| {
        let mut new = scripted_job(dataset, &json!({"steps": 20, "step_ms": 1, "hold_at": 5}));
        new.owner = Some(owner);
        server.handle.app().create_job(&new, None).await.unwrap().id
    };
    let (first, second, third) = (post(one).await, post(one).await, post(free).await);
    for id in [first, third] {
        server.wait(id, "its step", |job| job.step == 5).await;
    }
    assert_eq!(
        server.store().job(second).await.unwrap().status,
        JobStatus::Queued,
        "a second one of the same key"
    );
    crate::scripted::let_go(&server.store().attempt(first, 1).await.unwrap().dir);
    server.wait(second, "its turn", |job| job.step == 5).await;
    for id in [second, third] {
        crate::scripted::let_go(&server.store().attempt(id, 1).await.unwrap().dir);
    }
    let start = Instant::now();
    for id in [first, second, third] {
        assert_eq!(server.ended(id).await.status, JobStatus::Succeeded);
    }
    assert!(start.elapsed() < PATIENCE * 3);
}
