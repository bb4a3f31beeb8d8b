//! A disk that is really full: the program as it ships on a file system of 72 MiB of its own, which the test fills and frees.

use std::{
    io::{BufRead as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    corpus::{pictures, zip},
    server::PATIENCE,
};

const DISK_MIB: u64 = 72;

/// The program in a mount namespace of its own, which goes with it.
struct Disk {
    child: Child,
    url: String,
    http: reqwest::Client,
    data: PathBuf,
    /// What `nsenter` needs beside the process.
    namespaces: Vec<&'static str>,
    _dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        // As root, or as anyone where the system allows user namespaces.
        let ways = [vec!["--mount"], vec!["--mount", "--user", "--map-root-user"]];
        for way in ways {
            let mut child = Command::new("unshare")
                .args(&way)
                .args([
                    "sh",
                    "-c",
                    "mount -t tmpfs -o size=\"$0\"m tmpfs \"$1\" && shift && exec \"$@\"",
                ])
                .arg(DISK_MIB.to_string())
                .arg(&data)
                .args([env!("CARGO_BIN_EXE_lorad"), "serve", "--bind", "127.0.0.1:0"])
                .envs([
                    ("LORAD_STORAGE__DATA_DIR", data.to_str().unwrap()),
                    ("LORAD_STORAGE__MIN_FREE_BYTES", "4194304"),
                    ("LORAD_STORAGE__BALLAST_BYTES", "2097152"),
                    ("LORAD_SCHEDULER__HEARTBEAT_MS", "200"),
                    ("LORAD_SCHEDULER__TICK_MS", "100"),
                    ("LORAD_SCHEDULER__RETRY_BACKOFF_MS", "50"),
                    ("LORAD_SCHEDULER__KILL_GRACE_MS", "2000"),
                ])
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .expect("`unshare` of util-linux starts");
            let mut url = String::new();
            std::io::BufReader::new(child.stdout.take().unwrap())
                .read_line(&mut url)
                .unwrap();
            if url.starts_with("http://") {
                let namespaces = if way.len() == 1 {
                    vec!["--mount"]
                } else {
                    vec!["--mount", "--user", "--preserve-credentials"]
                };
                return Self {
                    child,
                    url: url.trim().to_owned(),
                    http: reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap(),
                    data,
                    namespaces,
                    _dir: dir,
                };
            }
            child.wait().unwrap();
        }
        panic!(
            "this test mounts a small tmpfs in a namespace of its own: run it as root (with CAP_SYS_ADMIN), or allow \
             unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
        );
    }

    /// A path of the data directory as this process sees it.
    fn inside(&self, name: &str) -> PathBuf {
        let root = format!("/proc/{}/root", self.child.id());
        Path::new(&root).join(self.data.strip_prefix("/").unwrap()).join(name)
    }

    /// Takes every free byte.
    fn fill(&self) {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.inside("filler"))
            .unwrap();
        for size in [1 << 20, 1 << 12, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.inside("filler")).unwrap();
    }

    async fn get(&self, path: &str) -> Value {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.unwrap();
        assert_eq!(response.status(), 200, "GET {path}");
        response.json().await.unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self
            .http
            .post(format!("{}{path}", self.url))
            .json(body)
            .send()
            .await
            .unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    async fn upload(&self) -> (u16, Value) {
        let file = reqwest::multipart::Part::bytes(zip(&pictures(2))).file_name("upload.zip");
        let form = reqwest::multipart::Form::new().part("file", file);
        let sent = self.http.post(format!("{}/datasets", self.url)).multipart(form).send();
        let response = sent.await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    async fn submit(&self, steps: u64) -> String {
        let mut job = self.get("/demo").await;
        job["hyperparameters"] = json!({"max_train_steps": steps, "batch_size": 1, "lora_rank": 2, "checkpoint_every_steps": 2,
            "keep_checkpoints": 1});
        job["sampling"] = json!({"prompts": []});
        let (status, body) = self.post("/jobs", &job).await;
        assert_eq!(status, 201, "{body:#}");
        body["id"].as_str().unwrap().to_owned()
    }

    async fn until(&self, job: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let found = self.get(&format!("/jobs/{job}")).await;
            if wanted(&found) {
                return found;
            }
            assert!(start.elapsed() < 2 * PATIENCE, "{what} does not come: {found:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_breaks_nothing_cancel_and_delete_still_work_and_jobs_go_on_when_there_is_room() {
    let disk = Disk::new();
    let long = disk.submit(100_000).await;
    let waiting = disk.submit(4).await;
    let trains = disk
        .until(&long, "training", |job| job["step"].as_u64() >= Some(4))
        .await;

    // Full while it trains, writes checkpoints and logs, and the server stores its events.
    disk.fill();
    let (status, refused) = disk.upload().await;
    assert_eq!(
        (status, refused["code"].as_str()),
        (507, Some("storage.full")),
        "{refused:#}"
    );
    let (status, refused) = disk.post("/jobs", &json!({"name": "x".repeat(200)})).await;
    assert!(matches!(status, 422 | 507), "{refused:#}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(disk.get("/readyz").await["status"], "ok");
    assert_eq!(disk.get(&format!("/jobs/{long}")).await["status"], "running");
    disk.free();
    let step = trains["step"].as_u64().unwrap();
    let after = disk
        .until(&long, "going on", |job| job["step"].as_u64() >= Some(step + 4))
        .await;
    assert_eq!(
        (&after["status"], &after["attempt"]),
        (&json!("running"), &json!(1)),
        "training was lost"
    );

    // Full again, and someone wants to get rid of the job.
    disk.fill();
    let (status, body) = disk
        .post(&format!("/jobs/{long}/cancel"), &json!({"mode": "force"}))
        .await;
    assert_eq!(status, 202, "{body:#}");
    disk.until(&long, "the cancellation", |job| job["status"] == "cancelled")
        .await;
    let start = Instant::now();
    loop {
        let delete = disk
            .http
            .delete(format!("{}/jobs/{long}", disk.url))
            .send()
            .await
            .unwrap();
        if delete.status() == 204 {
            break;
        }
        // Until its process is seen dead.
        assert_eq!(delete.status(), 409);
        assert!(start.elapsed() < PATIENCE, "a job on a full disk cannot be deleted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    disk.free();

    // Everything goes on by itself.
    let done = disk.until(&waiting, "the end of the job that waited", |job| {
        ["succeeded", "failed", "cancelled"]
            .iter()
            .any(|status| job["status"] == *status)
    });
    let done = done.await;
    assert_eq!(done["status"], "succeeded", "{done:#}");
    let (status, body) = disk.upload().await;
    assert_eq!(status, 201, "{body:#}");
    let start = Instant::now();
    while !disk.inside("ballast").exists() {
        assert!(start.elapsed() < PATIENCE, "the ballast is not made again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let fsck = Command::new("nsenter")
        .args(&disk.namespaces)
        .args(["--target", &disk.child.id().to_string()])
        .args([env!("CARGO_BIN_EXE_lorad"), "fsck", "--data-dir"])
        .arg(&disk.data)
        .output()
        .unwrap();
    assert!(
        fsck.status.success(),
        "{}{}",
        String::from_utf8_lossy(&fsck.stdout),
        String::from_utf8_lossy(&fsck.stderr)
    );
    println!(
        "full disk ({DISK_MIB} MiB tmpfs): 507 for uploads, training went on after {} steps, cancel and delete on a full disk, the \
         waiting job succeeded, fsck finds nothing",
        after["step"]
    );
}
