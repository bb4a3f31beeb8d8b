//! A server on a free port with a data directory of its own, and a client for it. Workers and picture decoding run in
//! the real binary.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lorad::{
    config::Config,
    serve::{ServerHandle, serve},
};
use serde_json::{Value, json};

/// A running server and a way to talk to it.
pub struct Client {
    pub http: reqwest::Client,
    server: Option<ServerHandle>,
    dir: tempfile::TempDir,
    flags: Vec<(&'static str, String)>,
}

impl Client {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With settings, e.g. `("limits.archive_entries", "200")`.
    pub async fn start_with(settings: &[(&'static str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut flags = vec![
            ("server.bind", "127.0.0.1:0".to_owned()),
            ("storage.data_dir", path_text(&dir.path().join("data"))),
            ("storage.fsync", "false".to_owned()),
            ("scheduler.worker_program", env!("CARGO_BIN_EXE_lorad").to_owned()),
            ("scheduler.heartbeat_ms", "500".to_owned()),
        ];
        flags.extend(settings.iter().map(|(key, value)| (*key, (*value).to_owned())));
        std::fs::create_dir(dir.path().join("roots")).unwrap();
        let mut client = Self {
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            server: None,
            dir,
            flags,
        };
        client.restart().await;
        client
    }

    /// Stops the server, if one runs, and starts one on the same data directory.
    pub async fn restart(&mut self) {
        self.stop().await;
        let environment = [("LORAD_MODELS__ROOTS".to_owned(), path_text(&self.roots()))].into();
        let config = Config::from_layers(None, environment, &self.flags).unwrap();
        self.server = Some(serve(config).await.unwrap());
    }

    /// Stops the server.
    pub async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown().await;
        }
    }

    pub fn store(&self) -> &lorad::store::Store {
        &self.server.as_ref().unwrap().app().store
    }

    /// From now on every request carries this key.
    pub fn use_key(&mut self, key: &str) {
        let mut headers = reqwest::header::HeaderMap::new();
        headers.insert("authorization", format!("Bearer {key}").parse().unwrap());
        let http = reqwest::Client::builder().no_proxy().default_headers(headers);
        self.http = http.build().unwrap();
    }

    /// The folder under which base models may be registered.
    pub fn roots(&self) -> PathBuf {
        self.dir.path().join("roots")
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// An address on the server; `""`: its origin.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.as_ref().unwrap().address())
    }

    pub async fn json(&self, path: &str) -> Value {
        let response = self.http.get(self.url(path)).send().await.unwrap();
        assert!(response.status().is_success(), "GET {path}: {}", response.status());
        response.json().await.unwrap()
    }

    pub async fn get_bytes(&self, path: &str) -> Vec<u8> {
        let response = self.http.get(self.url(path)).send().await.unwrap();
        assert!(response.status().is_success(), "GET {path}: {}", response.status());
        response.bytes().await.unwrap().to_vec()
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(self.http.post(self.url(path)).json(body)).await
    }

    pub async fn post_text(&self, path: &str, media: &str, body: String) -> (u16, Value) {
        let mut request = self.http.post(self.url(path)).body(body);
        if !media.is_empty() {
            request = request.header("content-type", media);
        }
        answer(request).await
    }

    /// `POST /datasets`.
    pub async fn upload(&self, name: &str, archive: Vec<u8>) -> (u16, Value) {
        let file = reqwest::multipart::Part::bytes(archive).file_name("upload.zip");
        let form = reqwest::multipart::Form::new()
            .text("name", name.to_owned())
            .part("file", file);
        answer(self.http.post(self.url("/datasets")).multipart(form)).await
    }

    /// `POST /jobs` with both parts.
    pub async fn submit_form(&self, job: &str, archive: Vec<u8>) -> (u16, Value) {
        let file = reqwest::multipart::Part::bytes(archive).file_name("my pictures.zip");
        let form = reqwest::multipart::Form::new()
            .text("job", job.to_owned())
            .part("dataset", file);
        answer(self.http.post(self.url("/jobs")).multipart(form)).await
    }

    /// Waits until a job has one of these statuses.
    pub async fn wait_for(&self, job: &str, statuses: &[&str], within: Duration) -> Value {
        let deadline = Instant::now() + within;
        loop {
            let found = self.json(&format!("/jobs/{job}")).await;
            if statuses.iter().any(|s| found["status"] == *s) {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "{job} is not {statuses:?} after {within:?}: {found:#}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Everything that uploads and jobs can leave behind: files under the data directory (not the database, whose pages
    /// come and go), datasets and jobs.
    pub async fn everything(&self) -> (BTreeSet<PathBuf>, Value, Value) {
        let mut files = BTreeSet::new();
        let mut open = vec![self.data()];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && !path.is_symlink() {
                    open.push(path.clone());
                }
                if !path.to_string_lossy().contains("lorad.sqlite3") {
                    files.insert(path);
                }
            }
        }
        (
            files,
            self.json("/datasets").await["data"].clone(),
            self.json("/jobs").await["data"].clone(),
        )
    }
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    let body = if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).unwrap_or(Value::String(text))
    };
    (status, body)
}

fn path_text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// The demo's job, cut down to a few steps without sample pictures.
pub async fn demo_job(client: &Client) -> Value {
    let mut job = client.json("/demo").await;
    job["hyperparameters"]["max_train_steps"] = json!(4);
    job["hyperparameters"]["batch_size"] = json!(1);
    job["sampling"] = json!({"prompts": []});
    job
}
