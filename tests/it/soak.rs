//! Short jobs for a long time: nothing may grow. `LORAD_TEST_SOAK_S` makes it longer, and from 60 s on the jobs of five seconds
//! come, several at a time.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use lorad::{
    domain::{DatasetId, JobStatus},
    store::Store,
};
use serde_json::{Value, json};

use crate::{
    chaos::times,
    recovery::prepared,
    scripted::{self, Stats},
    server::{ServerProcess, scripted_job, settings, wait},
};

/// One slot each; scripted workers use none of them.
const DEVICES: [&str; 5] = ["cpu", "cuda:0", "cuda:1", "cuda:2", "cuda:3"];

/// What a server holds when no job runs.
#[derive(Debug, Clone, Copy)]
struct Held {
    open_files: u64,
    threads: u64,
    resident_bytes: u64,
    wal_bytes: u64,
    temporary_files: u64,
    stats: Stats,
}

async fn held(dir: &Path, pid: u32) -> Held {
    let count = |folder: &str| std::fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().count() as u64;
    let wal = dir.join("data/lorad.sqlite3-wal");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    Held {
        open_files: count("fd"),
        threads: count("task"),
        resident_bytes: resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10,
        temporary_files: std::fs::read_dir(dir.join("data/tmp")).unwrap().count() as u64,
        wal_bytes: wal.metadata().map_or(0, |wal| wal.len()),
        stats: scripted::stats(dir).await,
    }
}

/// One job, watched by one viewer to its end and by one who hangs up, and deleted.
async fn run_a_job(http: &reqwest::Client, address: &str, store: &Store, dataset: DatasetId, script: &Value) {
    let job = store.insert_job(&scripted_job(dataset, script), None).await.unwrap();
    let url = format!("http://{address}/jobs/{}", job.id);
    let (watched, left) = (
        http.get(format!("{url}/events")).send().await.unwrap(),
        http.get(format!("{url}/events")).send().await.unwrap(),
    );
    drop(left);
    let done = wait(store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!(done.status, JobStatus::Succeeded);
    watched.bytes().await.unwrap();
    while http.delete(&url).send().await.unwrap().status() == 409 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_runs_short_jobs_for_long_holds_no_more_at_the_end_than_at_the_beginning() {
    let seconds = u64::try_from(times("LORAD_TEST_SOAK_S", 20)).unwrap();
    // From a minute on, jobs of five seconds go beside the short ones, which cost hardly any processor.
    let n_long = if seconds < 60 { 0 } else { DEVICES.len() - 1 };
    let dir = tempfile::tempdir().unwrap();
    let (store, first) = prepared(dir.path(), json!({"steps": 2, "step_ms": 1})).await;
    let devices = DEVICES.join(",");
    let server = ServerProcess::start(dir.path(), &settings(dir.path(), &[("scheduler.devices", &devices)])).await;
    wait(&store, first.id, "the first end", |job| job.status.is_final()).await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let short = json!({"steps": 6, "step_ms": 1, "checkpoint_every": 3});
    let long = json!({"steps": 100, "step_ms": 50, "checkpoint_every": 20});
    let run = |script| run_a_job(&http, &server.address, &store, first.dataset_id, script);
    let (start, mut n_jobs, mut samples) = (Instant::now(), 0, Vec::new());
    while start.elapsed() < Duration::from_secs(seconds) || samples.len() < 12 {
        let are_over = AtomicBool::new(false);
        let beside = async {
            futures_util::future::join_all((0..n_long).map(|_| run(&long))).await;
            are_over.store(true, Ordering::Relaxed);
        };
        let shorts = async {
            let mut n = 0;
            while n == 0 || !are_over.load(Ordering::Relaxed) {
                run(&short).await;
                n += 1;
                if n_long > 0 {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
            n
        };
        let ((), n_short) = tokio::join!(beside, shorts);
        n_jobs += n_long + n_short;
        // Now no job runs.
        samples.push(held(dir.path(), server.pid()).await);
    }
    // What is held moves with the moment; its lowest value does not, unless something leaks.
    let third = samples.len() / 3;
    let (early, late) = (&samples[..third], &samples[samples.len() - third..]);
    let flat = |what: &str, of: fn(&Held) -> u64, slack: u64| {
        let highest_early = early.iter().map(of).max().unwrap();
        let lowest_late = late.iter().map(of).min().unwrap();
        assert!(
            lowest_late <= highest_early + slack,
            "{what} grew from at most {highest_early} in the first third to at least {lowest_late} in the last, over {n_jobs} jobs"
        );
        format!("{what} {highest_early} -> {lowest_late}")
    };
    // Connections and blocking threads are made when many are needed at a time, and stay. One left by every second job is seen.
    let pools = (n_jobs as u64 / 9).min(16);
    let figures = [
        flat("open files", |held| held.open_files, pools),
        flat("threads", |held| held.threads, pools),
        flat("event topics", |held| held.stats.topics, 0),
        flat("temporary files", |held| held.temporary_files, 0),
        flat("WAL bytes", |held| held.wal_bytes, 4 << 20),
        flat("heap bytes", |held| held.stats.heap_bytes, 4 << 20),
        flat("resident bytes", |held| held.resident_bytes, 16 << 20),
    ];
    println!(
        "soak: {n_jobs} jobs in {} s; {}",
        start.elapsed().as_secs(),
        figures.join(", ")
    );
    let left = std::fs::read_dir(dir.path().join("data/jobs")).unwrap().count();
    assert_eq!(left, 1, "folders of deleted jobs are left");
    server.kill();
}
