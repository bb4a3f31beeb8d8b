//! What the server refuses or ends before it can hurt: silent connections, full disks, large pictures. And what it takes.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    client::{Client, demo_job},
    corpus::{Entry, jpeg, pictures, png, webp, zip},
};

/// Far more than a loaded machine needs, far less than for ever.
const LONG: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_request_head_never_ends_is_closed() {
    let client = Client::start_with(&[("server.header_timeout_ms", "1000")]).await;
    let address = client.url("").replace("http://", "");
    for head in ["", "GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: "] {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "{head:?} holds its connection for ever");
    }
    // One that is only slow, and done in time, is answered.
    let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    stream
        .write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        .await
        .unwrap();
    stream.write_all(b"Connection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_the_disk_has_no_room_for_is_refused_before_it_is_read() {
    let client = Client::start_with(&[("storage.min_free_bytes", "1099511627776")]).await;
    let before = client.everything().await;
    let (status, body) = client.upload("too much", zip(&pictures(2))).await;
    assert_eq!((status, body["code"].as_str()), (507, Some("storage.full")), "{body:#}");
    assert!(!body["hint"].as_str().unwrap().is_empty());
    assert!(body["detail"].as_str().unwrap().contains("MiB"), "{body:#}");
    let job = demo_job(&client).await;
    let (status, body) = client.submit_form(&job.to_string(), zip(&pictures(2))).await;
    assert_eq!((status, body["code"].as_str()), (507, Some("storage.full")), "{body:#}");
    assert_eq!(client.everything().await, before);
    // What needs no room still works: a job on a dataset that is there.
    let (status, body) = client.post("/jobs?dry_run=true", &job).await;
    assert_eq!(status, 200, "{body:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_on_pixels_reaches_the_decoder() {
    let client = Client::start_with(&[("limits.image_pixels", "1200")]).await;
    let with = |width, height| {
        zip(&[
            Entry::new("a.png", png(width, height)),
            Entry::new("a.txt", "a picture"),
        ])
    };
    let (status, body) = client.upload("just", with(40, 30)).await;
    assert_eq!(status, 201, "{body:#}");
    let (status, body) = client.upload("above", with(41, 30)).await;
    assert_eq!(
        (status, body["errors"][0]["code"].as_str()),
        (422, Some("image.too_large")),
        "{body:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn png_jpeg_and_webp_pictures_make_one_dataset() {
    let client = Client::start().await;
    let archive = zip(&[
        Entry::new("a.png", png(40, 30)),
        Entry::new("a.txt", "first"),
        Entry::new("b.jpg", jpeg(48, 32)),
        Entry::new("b.txt", "second"),
        Entry::new("c.webp", webp(50, 37)),
        Entry::new("c.txt", "third"),
    ]);
    let (status, body) = client.upload("mixed", archive).await;
    assert_eq!((status, body["n_items"].as_u64()), (201, Some(3)), "{body:#}");
    let id = body["id"].as_str().unwrap();
    let items = client.json(&format!("/datasets/{id}/items")).await;
    let sizes: Vec<_> = items["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| json!([item["caption"], item["width"], item["height"]]))
        .collect();
    assert_eq!(
        sizes,
        [
            json!(["first", 40, 30]),
            json!(["second", 48, 32]),
            json!(["third", 50, 37])
        ]
    );
    let thumbnail = client.get_bytes(&format!("/datasets/{id}/items/2/thumbnail")).await;
    assert!(thumbnail.starts_with(b"\x89PNG"), "thumbnails are re-encoded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_job_leaves_no_file_that_nobody_can_reach() {
    let client = Client::start().await;
    let (status, body) = client.post("/jobs", &demo_job(&client).await).await;
    assert_eq!(status, 201, "{body:#}");
    let id = body["id"].as_str().unwrap();
    client.wait_for(id, &["succeeded"], Duration::from_secs(120)).await;
    let folder = client.data().join("artifacts").join(id);
    assert!(folder.read_dir().unwrap().count() > 0);
    let delete = async |query: &str| {
        let url = client.url(&format!("/jobs/{id}{query}"));
        loop {
            let response = client.http.delete(&url).send().await.unwrap();
            // The worker of a finished job takes a moment to end.
            if response.status() != 409 {
                return response.status().as_u16();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert_eq!(delete("?artifacts=keep").await, 400);
    assert_eq!(delete("").await, 204);
    assert!(!folder.exists());
}
