//! Base models from a hub: a mirror on this machine serves the tiny model of `tests/golden` as Hugging Face's hub would.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::client::Client;

const FIRST: &str = "1111111111111111111111111111111111111111";
const SECOND: &str = "2222222222222222222222222222222222222222";

/// A repository `someone/tiny` with two commits; `main` is one of them.
struct Mirror {
    url: String,
    hub: Arc<Hub>,
}

struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    head: Mutex<&'static str>,
    /// Large files end after half of their bytes, so many times.
    cuts: AtomicU32,
    /// Large files are served with one byte changed.
    damaged: AtomicBool,
    /// Large files are not served for now.
    held: AtomicBool,
    /// `Range` headers that came.
    ranges: Mutex<Vec<String>>,
    /// Commits that files were asked of.
    commits: Mutex<Vec<String>>,
}

fn model_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-sd1/model")
}

fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors")
}

impl Mirror {
    async fn start() -> Self {
        let mut files = BTreeMap::new();
        for entry in walk(&model_folder()) {
            let path = entry.strip_prefix(model_folder()).unwrap().to_str().unwrap().to_owned();
            files.insert(path, std::fs::read(&entry).unwrap());
        }
        files.insert("README.md".to_owned(), b"# tiny".to_vec());
        files.insert(
            "unet/diffusion_pytorch_model.bin".to_owned(),
            b"\x80\x02pickle".to_vec(),
        );
        let hub = Arc::new(Hub {
            files,
            head: Mutex::new(FIRST),
            cuts: AtomicU32::new(0),
            damaged: AtomicBool::new(false),
            held: AtomicBool::new(false),
            ranges: Mutex::default(),
            commits: Mutex::default(),
        });
        let router = Router::new()
            .route("/api/models/someone/tiny/revision/{revision}", get(revision))
            .route("/api/models/someone/tiny/tree/{commit}", get(tree))
            .route("/someone/tiny/resolve/{commit}/{*path}", get(resolve))
            .with_state(hub.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, hub }
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] })
        .collect()
}

async fn revision(State(hub): State<Arc<Hub>>, UrlPath(revision): UrlPath<String>) -> Response {
    let head = *hub.head.lock().unwrap();
    let sha = match revision.as_str() {
        "main" => head,
        FIRST => FIRST,
        SECOND => SECOND,
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    Json(json!({"id": "someone/tiny", "sha": sha, "tags": ["diffusers", "license:mit"]})).into_response()
}

/// In two pages, as large repositories come.
async fn tree(
    State(hub): State<Arc<Hub>>,
    UrlPath(commit): UrlPath<String>,
    headers: HeaderMap,
    uri: axum::http::Uri,
) -> Response {
    let entries: Vec<Value> = hub
        .files
        .iter()
        .map(|(path, bytes)| {
            let mut entry = json!({"type": "file", "path": path, "size": bytes.len(), "oid": "0".repeat(40)});
            if is_large(path) {
                entry["lfs"] =
                    json!({"oid": hex::encode(Sha256::digest(bytes)), "size": bytes.len(), "pointerSize": 1});
            } else {
                use sha1::Digest as _;
                let mut sha1 = sha1::Sha1::new();
                sha1.update(format!("blob {}\0", bytes.len()));
                sha1.update(bytes);
                entry["oid"] = json!(hex::encode(sha1.finalize()));
            }
            entry
        })
        .chain([json!({"type": "directory", "path": "unet", "size": 0, "oid": "0".repeat(40)})])
        .collect();
    let (first, second) = entries.split_at(entries.len() / 2);
    if uri.query().is_some_and(|query| query.contains("cursor=")) {
        return Json(second).into_response();
    }
    let host = headers[header::HOST].to_str().unwrap();
    let next = format!("<http://{host}/api/models/someone/tiny/tree/{commit}?cursor=2>; rel=\"next\"");
    ([(header::LINK, next)], Json(first)).into_response()
}

async fn resolve(
    State(hub): State<Arc<Hub>>,
    UrlPath((commit, path)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.commits.lock().unwrap().push(commit);
    let Some(bytes) = hub.files.get(&path) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    while is_large(&path) && hub.held.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut bytes = bytes.clone();
    if is_large(&path) && hub.damaged.load(Ordering::SeqCst) {
        *bytes.last_mut().unwrap() ^= 1;
    }
    let range = headers
        .get(header::RANGE)
        .map(|range| range.to_str().unwrap().to_owned());
    let start: usize = match &range {
        Some(range) => range
            .strip_prefix("bytes=")
            .unwrap()
            .trim_end_matches('-')
            .parse()
            .unwrap(),
        None => 0,
    };
    hub.ranges.lock().unwrap().extend(range);
    let rest = bytes.split_off(start);
    let status = if start > 0 {
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    };
    let cut = |n: u32| n.checked_sub(1);
    if is_large(&path) && hub.cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, cut).is_ok() {
        return (status, rest[..rest.len() / 2].to_vec()).into_response();
    }
    (status, [("x-repo-commit", FIRST)], rest).into_response()
}

async fn server(mirror: &Mirror) -> Client {
    let url: &'static str = Box::leak(mirror.url.clone().into_boxed_str());
    Client::start_with(&[("models.hub_endpoint", url)]).await
}

async fn post(client: &Client, body: &Value) -> (u16, Value) {
    let answer = client.http.post(client.url("/models")).json(body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

/// The model, as soon as it is not downloading any more.
async fn settled(client: &Client, id: &str) -> Value {
    let begun = Instant::now();
    loop {
        let model = client.json(&format!("/models/{id}")).await;
        if model["status"] != "downloading" {
            return model;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "still downloading: {model}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What lies among the models besides the bundled one.
fn left_behind(client: &Client) -> Vec<String> {
    let entries = std::fs::read_dir(client.data().join("models")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with("demo-icons")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_comes_from_the_hub_at_the_commit_that_was_asked_and_is_trained_on() {
    let mirror = Mirror::start().await;
    mirror.hub.cuts.store(2, Ordering::SeqCst);
    mirror.hub.held.store(true, Ordering::SeqCst);
    let client = server(&mirror).await;
    let (status, model) = post(&client, &json!({"hub_id": "someone/tiny"})).await;
    assert_eq!(status, 202, "{model}");
    assert_eq!(
        (&model["id"], &model["status"]),
        (&json!("tiny"), &json!("downloading"))
    );
    assert_eq!(model["source"], format!("hub:someone/tiny@{FIRST}"));
    assert_eq!(post(&client, &json!({"hub_id": "someone/tiny"})).await.0, 409);
    // The branch moves on while it is being downloaded.
    *mirror.hub.head.lock().unwrap() = SECOND;
    mirror.hub.held.store(false, Ordering::SeqCst);
    let model = settled(&client, "tiny").await;
    assert_eq!(model["status"], "ready", "{model}");
    assert_eq!((&model["family"], &model["licence"]), (&json!("sd1"), &json!("mit")));
    assert_eq!(model["source"], format!("hub:someone/tiny@{FIRST}"));
    assert!(mirror.hub.commits.lock().unwrap().iter().all(|commit| commit == FIRST));
    assert_eq!(
        mirror.hub.ranges.lock().unwrap().len(),
        2,
        "it did not go on where it was cut off"
    );
    // Nothing but what is needed, byte for byte.
    let dir = client.data().join("models/tiny");
    assert!(!dir.join("README.md").exists() && !dir.join("unet/diffusion_pytorch_model.bin").exists());
    for path in walk(&model_folder()) {
        let name = path.strip_prefix(model_folder()).unwrap();
        assert!(
            std::fs::read(dir.join(name)).unwrap() == std::fs::read(&path).unwrap(),
            "{}",
            name.display()
        );
    }

    let datasets = client.json("/datasets").await;
    let job = json!({"name": "on-tiny", "base_model": "tiny", "dataset_id": datasets["data"][0]["id"],
        "hyperparameters": {"max_train_steps": 2, "batch_size": 2, "lora_rank": 2, "resolution": 32}});
    let answer = client.http.post(client.url("/jobs")).json(&job).send().await.unwrap();
    assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    let id = answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    let begun = Instant::now();
    loop {
        let job = client.json(&format!("/jobs/{id}")).await;
        if job["finished_at"].is_string() {
            assert_eq!(job["status"], "succeeded", "{job}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{job}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_refused_and_the_next_try_goes_on() {
    let mirror = Mirror::start().await;
    mirror.hub.damaged.store(true, Ordering::SeqCst);
    let client = server(&mirror).await;
    let request = json!({"hub_id": format!("someone/tiny@{FIRST}"), "id": "mine"});
    assert_eq!(post(&client, &request).await.0, 202);
    let model = settled(&client, "mine").await;
    assert_eq!(model["status"], "failed", "{model}");
    assert_eq!(model["download"]["error"]["code"], "hub.hash_mismatch", "{model}");
    let refused = client
        .http
        .post(client.url("/jobs?dry_run=true"))
        .json(&json!({"name": "x", "base_model": "mine", "dataset_id": "ds_x"}))
        .send()
        .await
        .unwrap();
    let text = refused.text().await.unwrap();
    assert!(text.contains("has not been downloaded completely"), "{text}");

    mirror.hub.damaged.store(false, Ordering::SeqCst);
    let before = mirror.hub.commits.lock().unwrap().len();
    assert_eq!(post(&client, &request).await.0, 202);
    assert_eq!(settled(&client, "mine").await["status"], "ready");
    let asked = mirror.hub.commits.lock().unwrap().len() - before;
    assert!(
        asked < before + 3,
        "what was here already was downloaded again: {asked} files"
    );
    assert_eq!(left_behind(&client), ["mine"]);
    let gone = client.http.delete(client.url("/models/mine")).send().await.unwrap();
    assert_eq!(gone.status(), 204);
    assert!(left_behind(&client).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_after_a_restart_and_a_cancelled_one_leaves_nothing() {
    let mirror = Mirror::start().await;
    mirror.hub.held.store(true, Ordering::SeqCst);
    let mut client = server(&mirror).await;
    for id in ["kept", "dropped"] {
        assert_eq!(post(&client, &json!({"hub_id": "someone/tiny", "id": id})).await.0, 202);
    }
    client.restart().await;
    let model = client.json("/models/kept").await;
    assert_eq!(model["status"], "downloading", "{model}");
    let cancelled = client.http.delete(client.url("/models/dropped")).send().await.unwrap();
    assert_eq!(cancelled.status(), 204);
    mirror.hub.held.store(false, Ordering::SeqCst);
    assert_eq!(settled(&client, "kept").await["status"], "ready");
    let begun = Instant::now();
    while left_behind(&client) != ["kept"] {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", left_behind(&client));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hub_does_not_have_and_a_hub_that_does_not_answer_are_said_clearly() {
    let mirror = Mirror::start().await;
    let client = server(&mirror).await;
    for (body, status, code) in [
        (json!({"hub_id": "someone/other"}), 422, "hub.not_found"),
        (json!({"hub_id": "someone/tiny@v9"}), 422, "hub.not_found"),
        (json!({"hub_id": "../etc"}), 422, "request.invalid"),
        (json!({"hub_id": "someone/tiny", "path": "/x"}), 422, "request.invalid"),
    ] {
        let (found, answer) = post(&client, &body).await;
        assert_eq!(
            (found, answer["code"].as_str()),
            (status, Some(code)),
            "{body}: {answer}"
        );
    }
    // A port that nobody listens on.
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let offline = Mirror {
        url: format!("http://{nobody}"),
        hub: mirror.hub.clone(),
    };
    let client = server(&offline).await;
    let (status, answer) = post(&client, &json!({"hub_id": "someone/tiny"})).await;
    assert_eq!((status, &answer["code"]), (502, &json!("hub.unreachable")), "{answer}");
    assert!(answer["hint"].as_str().unwrap().contains("HF_ENDPOINT"), "{answer}");
    let client = Client::start_with(&[("models.hub_endpoint", "off")]).await;
    assert_eq!(
        post(&client, &json!({"hub_id": "someone/tiny"})).await.1["code"],
        "hub.off"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_pulls_into_the_data_folder_and_finds_what_it_pulled() {
    let mirror = Mirror::start().await;
    mirror.hub.cuts.store(1, Ordering::SeqCst);
    let data = tempfile::tempdir().unwrap();
    let lorad = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command
            .args(arguments)
            .env("LORAD_STORAGE__DATA_DIR", data.path())
            .env("HF_ENDPOINT", &mirror.url)
            .env("HF_TOKEN", "hf_secret");
        command
    };
    let run = |mut command: Command| async move {
        tokio::task::spawn_blocking(move || command.output())
            .await
            .unwrap()
            .unwrap()
    };
    let pulled = run(lorad(&["models", "pull", "someone/tiny"])).await;
    let said = String::from_utf8_lossy(&pulled.stderr).into_owned();
    assert!(pulled.status.success(), "{said}");
    assert!(said.contains(FIRST) && !said.contains("hf_secret"), "{said}");
    assert!(data.path().join("models/tiny/model_index.json").is_file());
    let listed = run(lorad(&["models", "--json"])).await;
    assert!(String::from_utf8_lossy(&listed.stdout).contains("\"id\": \"tiny\""));
    let again = run(lorad(&["models", "pull", "someone/tiny"])).await;
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("--id"));
}
