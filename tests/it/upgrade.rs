//! The program is replaced while it is at work, as a package manager and a service manager do it: another file is renamed over
//! it, the server gets SIGTERM, the new program is started on the same data directory. Its worker trains on under all of them.
//!
//! Usually the builds are the same but for their files. `LORAD_TEST_OLD_PROGRAM` names a real older one to begin with; then
//! the first upgrade brings its database up to date too.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::server::{PATIENCE, signal};

/// How long the job trains: longer than both upgrades take.
const JOB: Duration = Duration::from_secs(12);
/// What a service manager waits before it kills.
const LONGEST_STOP: Duration = Duration::from_secs(30);

/// The program's file, which is replaced.
struct Installed {
    program: PathBuf,
    n_builds: u32,
}

impl Installed {
    fn new(dir: &Path) -> Self {
        let program = dir.join("lorad");
        let old = std::env::var_os("LORAD_TEST_OLD_PROGRAM");
        copy(
            old.as_deref().unwrap_or(env!("CARGO_BIN_EXE_lorad").as_ref()).as_ref(),
            &program,
            "",
        );
        Self { program, n_builds: 1 }
    }

    /// Another file, with other bytes, under the same name.
    fn replace(&mut self) {
        self.n_builds += 1;
        let fresh = self.program.with_extension("new");
        copy(
            env!("CARGO_BIN_EXE_lorad").as_ref(),
            &fresh,
            &format!("build {}", self.n_builds),
        );
        std::fs::rename(fresh, &self.program).unwrap();
    }
}

/// By another process: a program that this one has open for writing, even in a child that is just being started, cannot be run.
fn copy(from: &Path, to: &Path, tail: &str) {
    let script = "cp \"$0\" \"$1\" && printf %s \"$2\" >> \"$1\"";
    let copied = Command::new("sh")
        .args(["-c", script])
        .args([from, to])
        .arg(tail)
        .status();
    assert!(copied.unwrap().success());
}

/// A server that was started from the installed program.
struct Running {
    child: Child,
    url: String,
}

impl Running {
    fn start(program: &Path, data: &Path) -> Self {
        let mut child = Command::new(program)
            .args(["serve", "--bind", "127.0.0.1:0"])
            .env("LORAD_STORAGE__DATA_DIR", data)
            .env("LORAD_SCHEDULER__HEARTBEAT_MS", "200")
            .env("LORAD_SCHEDULER__TICK_MS", "100")
            .env("LORAD_SCHEDULER__THREADS", "1")
            // It asks without a pause.
            .env("LORAD_LIMITS__REQUESTS_PER_MINUTE", "0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut url)
            .unwrap();
        assert!(url.starts_with("http://"), "{} does not start", program.display());
        let url = url.trim().to_owned();
        Self { child, url }
    }

    /// SIGTERM, `n_more` times again, and how long it took to end.
    fn stop(mut self, n_more: u32) -> Duration {
        let asked = Instant::now();
        signal(self.child.id(), Signal::TERM);
        for _ in 0..n_more {
            std::thread::sleep(Duration::from_millis(20));
            if self.child.try_wait().unwrap().is_none() {
                signal(self.child.id(), Signal::TERM);
            }
        }
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(asked.elapsed() < LONGEST_STOP, "the server does not end");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert_eq!(status.code(), Some(0), "after {} SIGTERM: {status}", 1 + n_more);
        asked.elapsed()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Worker processes on this data directory, each with the ticks at which it was started.
fn workers(data: &Path) -> BTreeMap<u32, String> {
    let jobs = data.join("jobs").display().to_string();
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments = String::from_utf8_lossy(&arguments);
        let is_worker = arguments.contains("worker\0--attempt-dir\0") && arguments.contains(&jobs);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        (is_worker && !matches!(fields[0], "Z" | "X")).then(|| (pid, fields[19].to_owned()))
    })
    .collect()
}

/// What clients that ask all the time saw, whichever server there was.
struct Load {
    url: Mutex<String>,
    is_over: AtomicBool,
    /// Answers that came whole.
    whole: AtomicUsize,
    /// Requests that nobody took: there was no server, or it hung up before the first byte of an answer.
    refused: AtomicUsize,
    /// Answers that broke off.
    cut: Mutex<Vec<String>>,
    /// Jobs that were posted in between, by their keys.
    posted: Mutex<BTreeMap<String, Option<String>>>,
}

impl Load {
    fn url(&self) -> String {
        self.url.lock().unwrap().clone()
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Reads an answer to its end, if one comes.
    async fn read(&self, what: &str, request: reqwest::RequestBuilder) -> Option<(u16, Vec<u8>)> {
        let Ok(response) = request.send().await else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(10)).await;
            return None;
        };
        let status = response.status().as_u16();
        match response.bytes().await {
            Ok(body) => {
                self.whole.fetch_add(1, Ordering::Relaxed);
                Some((status, body.to_vec()))
            }
            Err(error) => {
                self.cut.lock().unwrap().push(format!("{what}: {error:?}"));
                None
            }
        }
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap()
}

/// Reads lists over a connection that it keeps.
async fn read_lists(load: Arc<Load>) {
    let http = client();
    while !load.is_over() {
        for path in ["/jobs", "/datasets", "/models", "/openapi.json", "/"] {
            if let Some((status, _)) = load.read(path, http.get(format!("{}{path}", load.url()))).await {
                assert_eq!(status, 200, "{path}");
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Posts a job that waits behind the others, each under its own key until it is answered.
async fn post_jobs(load: Arc<Load>, body: Value, n_jobs: usize) {
    let http = client();
    for n in 0..n_jobs {
        let key = format!("posted-{n}");
        load.posted.lock().unwrap().insert(key.clone(), None);
        let id = loop {
            let request = http.post(format!("{}/jobs", load.url())).json(&body);
            if let Some((status, answer)) = load.read("POST /jobs", request.header("idempotency-key", &key)).await {
                let answer: Value = serde_json::from_slice(&answer).unwrap();
                assert_eq!(status, 201, "{answer:#}");
                break answer["id"].as_str().unwrap().to_owned();
            }
        };
        load.posted.lock().unwrap().insert(key, Some(id));
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
}

/// Watches a job to its end: every stored event once, in order, and each stream ends as a stream does.
async fn watch(load: Arc<Load>, job: String) -> Vec<Value> {
    let (http, mut cursor, mut events) = (client(), 0_u64, Vec::new());
    loop {
        let request = http.get(format!("{}/jobs/{job}/events", load.url()));
        let Ok(response) = request.header("last-event-id", cursor).send().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        if response.status() == 204 {
            return events;
        }
        assert_eq!(response.status(), 200);
        let (mut body, mut rest) = (response.bytes_stream(), Vec::new());
        let end = loop {
            match body.next().await {
                Some(Ok(chunk)) => rest.extend_from_slice(&chunk),
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        if let Some(error) = end {
            load.cut.lock().unwrap().push(format!("events: {error:?}"));
        }
        for block in String::from_utf8(rest).unwrap().split_terminator("\n\n") {
            let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
            if let (Some(id), Some(data)) = (field("id: "), field("data: ")) {
                let id: u64 = id.parse().unwrap();
                assert_eq!(id, cursor + 1, "a gap or a double");
                cursor = id;
                events.push(serde_json::from_str(data).unwrap());
            }
        }
    }
}

/// Begins to download a file. What is returned goes on slowly, and gives the SHA-256 of all of it.
fn download(url: &str, path: &str) -> impl FnOnce() -> String + Send + 'static {
    let address = url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    assert!(
        head.starts_with("http/1.0 200") || head.starts_with("http/1.1 200"),
        "{head}"
    );
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.unwrap().trim().parse().unwrap();
    move || {
        let (mut hash, mut left, mut buffer) = (Sha256::new(), length, vec![0; 1 << 20]);
        while left > 0 {
            let n = stream.read(&mut buffer).unwrap();
            assert!(n > 0, "{left} of {length} bytes of a download never came");
            hash.update(&buffer[..n]);
            left -= n;
            // 16 MB in a second.
            std::thread::sleep(Duration::from_micros(n as u64 / 16));
        }
        hex::encode(hash.finalize())
    }
}

async fn get(http: &reqwest::Client, url: &str, path: &str) -> Value {
    let response = http.get(format!("{url}{path}")).send().await.unwrap();
    assert_eq!(response.status(), 200, "GET {path}");
    response.json().await.unwrap()
}

async fn until(http: &reqwest::Client, url: &str, job: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let found = get(http, url, &format!("/jobs/{job}")).await;
        if wanted(&found) {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what} does not come: {found:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_replaced_under_load_keeps_its_worker_and_cuts_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut installed = Installed::new(dir.path());
    let mut server = Running::start(&installed.program, &data);
    let http = client();
    let mut job = get(&http, &server.url, "/demo").await;
    job["sampling"] = json!({"prompts": []});
    let submit = async |url: &str, steps: u64, is_merged: bool| -> String {
        let mut job = job.clone();
        job["hyperparameters"] = json!({"max_train_steps": steps, "batch_size": 1, "lora_rank": 2});
        job["export"] = json!({"merged_pipeline": is_merged});
        let posted = http.post(format!("{url}/jobs")).json(&job).send().await.unwrap();
        let body: Value = posted.json().await.unwrap();
        body["id"].as_str().unwrap_or_else(|| panic!("{body:#}")).to_owned()
    };
    // One that is over: a large file to download, and how long a step takes here.
    let over = submit(&server.url, 10, true).await;
    let done = until(&http, &server.url, &over, "its end", |job| {
        job["finished_at"].is_string()
    })
    .await;
    assert_eq!(done["status"], "succeeded", "{done:#}");
    let files = get(&http, &server.url, &format!("/jobs/{over}/files")).await;
    let files = files["data"].as_array().unwrap();
    let merged = files.iter().find(|file| file["kind"] == "merged").unwrap();
    let (path, sha256) = (
        merged["url"].as_str().unwrap().to_owned(),
        merged["sha256"].as_str().unwrap().to_owned(),
    );
    let metrics = get(&http, &server.url, &format!("/jobs/{over}/metrics?keys=step_ms")).await;
    let step_ms: Vec<f64> = serde_json::from_value(metrics["series"]["step_ms"]["last"].clone()).unwrap();
    let fastest = step_ms.into_iter().fold(f64::INFINITY, f64::min);
    let steps = (JOB.as_secs_f64() * 1e3 / fastest) as u64;

    let training = submit(&server.url, steps, false).await;
    let trains = |job: &Value| job["step"].as_u64() >= Some(2);
    until(&http, &server.url, &training, "training", trains).await;
    let worker = workers(&data);
    assert_eq!(worker.len(), 1, "{worker:?}");
    let load = Arc::new(Load {
        url: server.url.clone().into(),
        is_over: AtomicBool::new(false),
        whole: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
        cut: Mutex::default(),
        posted: Mutex::default(),
    });
    let mut waiting = job.clone();
    waiting["hyperparameters"] = json!({"max_train_steps": 1, "batch_size": 1, "lora_rank": 2});
    let readers: Vec<_> = (0..4).map(|_| tokio::spawn(read_lists(load.clone()))).collect();
    let viewers: Vec<_> = (0..5)
        .map(|_| tokio::spawn(watch(load.clone(), training.clone())))
        .collect();
    let poster = tokio::spawn(post_jobs(load.clone(), waiting, 6));

    let mut took = Vec::new();
    for n_more in [0, 1] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        // Begun before the end of its server, and read far too slowly to be over by then.
        let rest = tokio::task::spawn_blocking(download(&server.url, &path));
        installed.replace();
        took.push(tokio::task::block_in_place(|| server.stop(n_more)));
        assert_eq!(rest.await.unwrap(), sha256, "a download is not the file");
        assert_eq!(
            workers(&data),
            worker,
            "the worker went with its server, or another one came"
        );
        server = tokio::task::block_in_place(|| Running::start(&installed.program, &data));
        load.url.lock().unwrap().clone_from(&server.url);
        let now = get(&http, &server.url, &format!("/jobs/{training}")).await;
        assert_eq!(
            (&now["status"], &now["attempt"]),
            (&json!("running"), &json!(1)),
            "{now:#}"
        );
        let further = now["step"].as_u64().unwrap() + 5;
        until(&http, &server.url, &training, "going on", |job| {
            job["step"].as_u64() >= Some(further)
        })
        .await;
        assert_eq!(workers(&data), worker, "the new server does not leave the worker alone");
    }
    let done = until(&http, &server.url, &training, "its end", |job| {
        job["finished_at"].is_string()
    })
    .await;
    assert_eq!(
        (&done["status"], &done["attempt"]),
        (&json!("succeeded"), &json!(1)),
        "{:#}",
        done["error"]
    );
    for viewer in viewers {
        let events = viewer.await.unwrap();
        let succeeded = events.iter().filter(|event| event["to"] == "succeeded").count();
        assert_eq!(succeeded, 1, "a viewer saw {succeeded} ends");
    }
    poster.await.unwrap();
    load.is_over.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }
    let posted = load.posted.lock().unwrap().clone();
    for id in posted.values().flatten() {
        let done = until(&http, &server.url, id, "its end", |job| job["finished_at"].is_string()).await;
        assert_eq!(done["status"], "succeeded", "{done:#}");
    }
    let all = get(&http, &server.url, "/jobs?limit=100").await;
    assert_eq!(
        all["data"].as_array().unwrap().len(),
        posted.len() + 2,
        "a job twice, or lost"
    );
    let cut = load.cut.lock().unwrap().clone();
    assert!(cut.is_empty(), "answers broke off: {cut:#?}");
    let refused = load.refused.load(Ordering::Relaxed);
    assert!(refused > 0, "nobody asked while there was no server");
    println!(
        "rolling upgrade: {} builds, SIGTERM once and twice: exit 0 after {took:?}; one worker process throughout, its job of {steps} \
         steps succeeded in attempt 1; {} answers whole, 0 cut, {refused} requests found no server; 2 downloads of {} bytes \
         whole; {} jobs posted meanwhile, each once",
        installed.n_builds,
        load.whole.load(Ordering::Relaxed),
        merged["bytes"],
        posted.len()
    );
}
