//! Checking a data directory, and copying one while a job trains.

use std::{
    path::Path,
    process::{Command, Output},
};

use lorad::{
    domain::{EventKind, JobStatus, now_ms},
    store::Attempt,
};
use lorad_proto::event::{Envelope, WorkerEvent};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    scripted::let_go,
    server::{ServerProcess, TestServer, assert_every_step, settings, wait},
};

fn lorad(args: &[&str], data: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lorad"))
        .args(args)
        .env("LORAD_STORAGE__DATA_DIR", data)
        .output()
        .unwrap()
}

/// The codes that `lorad fsck` prints, and whether it exits with 0.
fn fsck(data: &Path) -> (Vec<String>, bool) {
    let run = lorad(&["fsck", "--json"], data);
    let findings: Value = serde_json::from_slice(&run.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&run.stderr)));
    let codes = findings.as_array().unwrap().iter();
    let codes = codes.map(|finding| finding["code"].as_str().unwrap().to_owned());
    (codes.collect(), run.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn fsck_names_what_is_missing_damaged_or_out_of_reach() {
    let server = TestServer::start().await;
    let job = server.post(json!({"steps": 3, "step_ms": 1})).await;
    server.ended(job.id).await;
    server.idle().await;
    let paused = server
        .post(json!({"steps": 9, "step_ms": 1, "checkpoint_every": 5, "hold_at": 6}))
        .await;
    server.wait(paused.id, "the hold", |job| job.step == 6).await;
    server.handle.app().pause_job(paused.id).await.unwrap();
    server
        .wait(paused.id, "the pause", |job| job.status == JobStatus::Paused)
        .await;
    server.idle().await;
    let data = server.handle.app().data.clone();
    // The scripted dataset has no folder.
    let usual = vec!["dataset.missing".to_owned()];
    assert_eq!(fsck(&data.root()), (usual.clone(), false));

    let file = data.artifacts().join(job.id.to_string()).join("receipt.json");
    let bytes = std::fs::read(&file).unwrap();
    let with = |code: &str| ([vec![code.to_owned()], usual.clone()].concat(), false);
    std::fs::write(&file, b"{\"step\":4}").unwrap();
    assert_eq!(fsck(&data.root()), with("file.damaged"));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(fsck(&data.root()), with("file.missing"));
    std::fs::write(&file, bytes).unwrap();
    let stray = data.artifacts().join("job_of_nobody");
    std::fs::create_dir(&stray).unwrap();
    assert_eq!(fsck(&data.root()), with("file.unreachable"));
    std::fs::remove_dir(&stray).unwrap();
    for checkpoint in server.store().checkpoints(paused.id).await.unwrap() {
        std::fs::write(checkpoint.path.join("state.json"), b"[]").unwrap();
    }
    let (codes, _) = fsck(&data.root());
    assert_eq!(codes, ["dataset.missing", "checkpoint.damaged"]);
    // A newer one that only the worker's spool tells of is enough: the next server reads that first.
    let attempt = server.store().attempt(paused.id, 1).await.unwrap();
    announce_checkpoint(&attempt, 99);
    assert_eq!(fsck(&data.root()).0, ["dataset.missing"]);
    assert_eq!(lorad(&["fsck"], &data.root().join("nothing")).status.code(), Some(1));
}

/// As a worker does that trains on while no server runs.
fn announce_checkpoint(attempt: &Attempt, step: u64) {
    let dir = attempt.dir.join("checkpoints/announced");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("state.json"), b"{}").unwrap();
    let hash = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
    let entry = json!({"bytes": 2, "sha256": hash(b"{}")});
    let manifest = json!({"version": 1, "step": step, "files": {"state.json": entry}}).to_string();
    std::fs::write(dir.join("manifest.json"), &manifest).unwrap();
    let event = WorkerEvent::Checkpoint {
        step,
        dir: "announced".to_owned(),
        bytes: 2,
        sha256: hash(manifest.as_bytes()),
    };
    let (seq, t_ms) = (attempt.acked_seq + 1, now_ms());
    let mut line = serde_json::to_vec(&Envelope { seq, t_ms, event }).unwrap();
    line.push(b'\n');
    let spool = std::fs::File::options()
        .append(true)
        .open(attempt.dir.join("events.jsonl"));
    std::io::Write::write_all(&mut spool.unwrap(), &line).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_made_while_a_job_trains_goes_on_elsewhere() {
    let server = TestServer::start().await;
    let finished = server.post(json!({"steps": 3, "step_ms": 1})).await;
    server.ended(finished.id).await;
    server.idle().await;
    let training = server
        .post(json!({"steps": 30, "step_ms": 1, "checkpoint_every": 10, "hold_at": 15}))
        .await;
    server.wait(training.id, "the hold", |job| job.step == 15).await;
    let original = server.store().attempt(training.id, 1).await.unwrap();

    let elsewhere = tempfile::tempdir().unwrap();
    let copy = elsewhere.path().join("data");
    let data = server.handle.app().data.root();
    let run = lorad(&["backup", "--to", copy.to_str().unwrap()], &data);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let again = lorad(&["backup", "--to", copy.to_str().unwrap()], &data);
    assert_eq!(again.status.code(), Some(1), "a backup was written over another one");

    // The original goes on as if nothing had been.
    let_go(&original.dir);
    let done = server.ended(training.id).await;
    assert_eq!((done.status, done.attempt), (JobStatus::Succeeded, 1));

    let settings = settings(elsewhere.path(), &[("scheduler.adopt_window_ms", "0")]);
    let restored = ServerProcess::start(elsewhere.path(), &settings).await;
    let store = lorad::store::Store::open(&copy.join("lorad.sqlite3")).await.unwrap();
    let done = wait(&store, training.id, "the end", |job| job.status.is_final()).await;
    assert_eq!(
        (done.status, done.attempt),
        (JobStatus::Succeeded, 2),
        "{:?}",
        done.error
    );
    assert_every_step(&store, &done, 30).await;
    let rows = store.metrics(training.id, 0, 30).await.unwrap();
    assert!(
        rows[9].attempt == 1 && rows[10].attempt == 2,
        "it did not go on from the checkpoint"
    );
    let second = store.attempt(training.id, 2).await.unwrap();
    assert!(second.dir.starts_with(copy.canonicalize().unwrap()), "{:?}", second.dir);
    let checkpoints = store
        .newest_events(training.id, EventKind::Checkpoint, 100)
        .await
        .unwrap();
    assert!(!checkpoints.is_empty());
    for id in [finished.id, training.id] {
        let url = format!("http://{}/jobs/{id}/files/receipt.json", restored.address);
        assert_eq!(reqwest::get(url).await.unwrap().status(), 200);
    }
    let (codes, _) = fsck(&copy);
    assert_eq!(
        codes,
        ["dataset.missing"],
        "the scripted dataset has no folder, the rest is whole"
    );
    restored.kill();
}
