//! Event streams: complete, in order, resumable, and ended when they should be.

use std::time::Duration;

use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::client::{Client, demo_job};

#[derive(Debug, Clone, PartialEq)]
struct Event {
    id: Option<u64>,
    name: String,
    data: Value,
}

/// Reads events until the stream ends, or `enough` of them came.
async fn read(client: &Client, job: &str, last_event_id: Option<u64>, enough: usize) -> (u16, Vec<Event>) {
    let mut request = client
        .http
        .get(client.url(&format!("/jobs/{job}/events")))
        .header("accept", "text/event-stream");
    if let Some(id) = last_event_id {
        request = request.header("last-event-id", id);
    }
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    if status == 200 {
        assert!(
            response.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        assert_eq!(response.headers()["x-accel-buffering"], "no");
        assert!(
            response.headers()["cache-control"]
                .to_str()
                .unwrap()
                .contains("no-transform")
        );
    }
    let mut events = Vec::new();
    let mut text = String::new();
    let mut body = response.bytes_stream();
    while let Some(Ok(chunk)) = body.next().await {
        text.push_str(std::str::from_utf8(&chunk).unwrap());
        while let Some(end) = text.find("\n\n") {
            let block: String = text.drain(..end + 2).collect();
            let field = |name: &str| {
                block
                    .lines()
                    .find_map(|l| l.strip_prefix(name))
                    .map(|v| v.trim_start().to_owned())
            };
            if let (Some(name), Some(data)) = (field("event:"), field("data:")) {
                events.push(Event {
                    id: field("id:").map(|id| id.parse().unwrap()),
                    name,
                    data: serde_json::from_str(&data).unwrap(),
                });
            }
            if events.len() >= enough {
                return (status, events);
            }
        }
    }
    (status, events)
}

async fn start(client: &Client, steps: u64) -> String {
    let mut job = demo_job(client).await;
    job["hyperparameters"]["max_train_steps"] = json!(steps);
    let (status, body) = client.post("/jobs", &job).await;
    assert_eq!(status, 201, "{body:#}");
    body["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_that_reconnects_every_few_events_sees_each_event_once_and_in_order() {
    let mut client = Client::start().await;
    let job = start(&client, 30).await;
    let mut seen: Vec<Event> = Vec::new();
    let mut cursor = 0;
    for round in 0..10_000 {
        let (status, events) = read(&client, &job, Some(cursor), 1 + round % 5).await;
        if status == 204 {
            break;
        }
        for event in events {
            if let Some(id) = event.id {
                cursor = id;
                seen.push(event);
            } else {
                assert!(matches!(event.name.as_str(), "progress" | "bye"), "{event:?}");
            }
        }
        // The server is restarted in the middle: ids go on where they were.
        if round == 7 {
            client.restart().await;
        }
    }
    let ids: Vec<u64> = seen.iter().map(|e| e.id.unwrap()).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>(), "a gap or a double");
    let steps: Vec<u64> = seen
        .iter()
        .filter(|e| e.name == "metrics")
        .flat_map(|e| {
            let column = e.data["cols"]
                .as_array()
                .unwrap()
                .iter()
                .position(|c| c == "step")
                .unwrap();
            e.data["rows"]
                .as_array()
                .unwrap()
                .iter()
                .map(move |r| r[column].as_u64().unwrap())
                .collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(steps, (1..=30).collect::<Vec<_>>());
    let ways: Vec<&str> = seen
        .iter()
        .filter(|e| e.name == "status")
        .map(|e| e.data["to"].as_str().unwrap())
        .collect();
    assert_eq!(ways, ["queued", "preparing", "running", "saving", "succeeded"]);
    assert_eq!(
        client.json(&format!("/jobs/{job}")).await["cursor"],
        ids.len().to_string()
    );
    // Someone who comes late gets the very same history.
    let (_, late) = read(&client, &job, Some(0), usize::MAX).await;
    let late: Vec<Event> = late.into_iter().filter(|e| e.id.is_some()).collect();
    assert_eq!(late, seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_viewer_starts_with_the_whole_job_and_is_told_when_it_is_over() {
    let client = Client::start().await;
    let job = start(&client, 20).await;
    let (_, events) = read(&client, &job, None, usize::MAX).await;
    assert_eq!(
        (events[0].name.as_str(), &events[0].data["id"]),
        ("snapshot", &json!(job))
    );
    let last = events.last().unwrap();
    assert_eq!((last.name.as_str(), &last.data["reason"]), ("bye", &json!("complete")));
    let ids: Vec<u64> = events.iter().filter_map(|e| e.id).collect();
    assert!(ids.windows(2).all(|w| w[1] == w[0] + 1), "{ids:?}");

    let end = *ids.last().unwrap();
    assert_eq!(
        read(&client, &job, Some(end), 1).await.0,
        204,
        "finished, and everything was seen"
    );
    let (_, resync) = read(&client, &job, Some(end + 1000), usize::MAX).await;
    let names: Vec<&str> = resync.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["resync", "snapshot", "bye"], "a cursor from another history");
    let bad = client
        .http
        .get(client.url(&format!("/jobs/{job}/events?after=x")))
        .send()
        .await
        .unwrap();
    assert_eq!(bad.status(), 400);
    let bad = client
        .http
        .get(client.url(&format!("/jobs/{job}/events")))
        .header("accept", "application/json");
    assert_eq!(bad.send().await.unwrap().status(), 406);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_the_server_stops() {
    let mut client = Client::start().await;
    let job = start(&client, 100_000).await;
    client.wait_for(&job, &["running"], Duration::from_secs(300)).await;
    let url = client.url(&format!("/jobs/{job}/events"));
    let response = client.http.get(url).send().await.unwrap();
    let body = tokio::spawn(response.text());
    tokio::time::sleep(Duration::from_millis(300)).await;
    let started = std::time::Instant::now();
    client.stop().await;
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "stopping took {:?}",
        started.elapsed()
    );
    let text = body.await.unwrap().unwrap();
    assert!(
        text.contains("event: bye") && text.contains("\"shutdown\""),
        "{}",
        &text[text.len().saturating_sub(500)..]
    );
    client.restart().await;
    client
        .post(&format!("/jobs/{job}/cancel"), &json!({"mode": "force"}))
        .await;
    client.wait_for(&job, &["cancelled"], Duration::from_secs(300)).await;
}
