//! What arms the fault points that the code declares, and the training loop under them: a run that dies, or finds no room, at
//! every step of its saving.
//!
//! [`obey`] is the hook of worker and server processes of tests. Nothing that ships holds it, so no user's binary can be
//! armed ([ADR 15](../../docs/adr/0015-fault-points.md)). [`crate::crashes`] does the same with the server's own points.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lorad::domain::{EventKind, JobId, JobStatus};
use lorad_faults::{Moment, Owner, Point};
use serde_json::{Value, json};

use crate::{
    chaos::tensors,
    scripted,
    server::{PATIENCE, TestServer},
};

/// Variable with the folder in which faults are armed.
pub const DIR: &str = "LORAD_TEST_FAULTS";
/// No room on the disk.
pub const ENOSPC: i32 = 28;
/// The disk is broken.
pub const EIO: i32 = 5;

/// A folder in which one fault at a time is armed, for whichever process passes the point.
pub struct Faults {
    dir: tempfile::TempDir,
}

impl Faults {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The process that next passes there dies.
    pub fn arm_abort(&self, point: Point, moment: Moment) {
        self.arm(&format!("{} {} abort", point.name(), moment.as_str()));
    }

    /// Every pass fails with this error number, until [`Faults::disarm`].
    pub fn arm_error(&self, point: Point, moment: Moment, errno: i32) {
        self.arm(&format!("{} {} {errno}", point.name(), moment.as_str()));
    }

    /// The next pass fails with this error number.
    pub fn arm_error_once(&self, point: Point, moment: Moment, errno: i32) {
        self.arm(&format!("{} {} {errno} once", point.name(), moment.as_str()));
    }

    fn arm(&self, fault: &str) {
        let _ = std::fs::remove_file(self.fired());
        let fresh = self.dir().join("fresh");
        std::fs::write(&fresh, fault).unwrap();
        std::fs::rename(fresh, self.dir().join("armed")).unwrap();
    }

    pub fn disarm(&self) {
        let _ = std::fs::remove_file(self.dir().join("armed"));
    }

    fn fired(&self) -> PathBuf {
        self.dir().join("fired")
    }

    pub fn has_fired(&self) -> bool {
        self.fired().exists()
    }
}

/// Makes this process obey what is armed, if it was started so.
pub fn obey() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else {
        return;
    };
    lorad_faults::install(move |point, moment| {
        let (armed, fired) = (dir.join("armed"), dir.join("fired"));
        let Ok(text) = std::fs::read_to_string(&armed) else {
            return Ok(());
        };
        let words: Vec<&str> = text.split(' ').collect();
        if words[..2] != [point.name(), moment.as_str()] {
            return Ok(());
        }
        match words[2].parse() {
            Ok(_) if words.get(3) == Some(&"once") && std::fs::rename(&armed, &fired).is_err() => Ok(()),
            Ok(errno) => {
                std::fs::write(fired, &text).unwrap();
                Err(io::Error::from_raw_os_error(errno))
            }
            // Only one process, and only once.
            Err(_) if std::fs::rename(armed, fired).is_ok() => std::process::abort(),
            Err(_) => Ok(()),
        }
    });
}

/// A server whose workers run the real trainer with fault points.
async fn real_server(faults: &Faults) -> TestServer {
    let program = scripted::faulty_program(faults.dir(), faults.dir(), true);
    TestServer::with(&[
        ("scheduler.worker_program", program.to_str().unwrap()),
        ("scheduler.threads", "1"),
        ("scheduler.max_failed_attempts", "1000"),
        ("scheduler.retry_backoff_ms", "0"),
    ])
    .await
}

async fn post(server: &TestServer, steps: u64) -> JobId {
    let dataset = server.store().dataset_by_name("silhouettes").await.unwrap().unwrap();
    let request = json!({
        "name": "same", "base_model": "demo-icons", "dataset_id": dataset.id,
        "hyperparameters": {"max_train_steps": steps, "batch_size": 1, "lora_rank": 2, "checkpoint_every_steps": 1,
            "keep_checkpoints": 1},
        "sampling": {"prompts": ["silhouette icon of key"], "num_inference_steps": 1},
    });
    let posted = reqwest::Client::new().post(server.url("/jobs")).json(&request);
    let body: Value = posted.send().await.unwrap().json().await.unwrap();
    body["id"]
        .as_str()
        .unwrap_or_else(|| panic!("{body:#}"))
        .parse()
        .unwrap()
}

/// Waits until what is armed has happened to a job that still runs.
async fn fired(server: &TestServer, faults: &Faults, job: JobId, what: &str) {
    let start = Instant::now();
    while !faults.has_fired() {
        let job = server.store().job(job).await.unwrap();
        assert!(
            !job.status.is_final(),
            "{what} was never passed: the job is {} after attempt {} {:?}",
            job.status,
            job.attempt,
            job.error
        );
        assert!(start.elapsed() < PATIENCE, "{what} is not passed at step {}", job.step);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn losses(server: &TestServer, job: JobId) -> Vec<Option<u64>> {
    let rows = server.store().metrics(job, 0, 1000).await.unwrap();
    rows.iter().map(|row| row.loss.map(f64::to_bits)).collect()
}

/// The points of the worker and of the training loop, in the order in which the code declares them; the exit note is the
/// last thing that a worker does, and comes after the end of its job.
fn trainers_points() -> impl Iterator<Item = (Point, Moment)> {
    let points = Point::ALL.iter().copied();
    let mine = points.filter(|point| point.owner() != Owner::Server && *point != Point::WriteExitNote);
    mine.flat_map(|point| point.moments().iter().map(move |moment| (point, *moment)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_dies_at_every_step_of_its_saving_gives_the_bytes_of_one_that_did_not() {
    const STEPS: u64 = 12;
    let faults = Faults::new();
    let server = real_server(&faults).await;
    let undisturbed = post(&server, STEPS).await;
    server.ended(undisturbed).await;

    let first = trainers_points().next().unwrap();
    faults.arm_abort(first.0, first.1);
    let job = post(&server, STEPS).await;
    let mut deaths = 0;
    for (point, moment) in trainers_points() {
        if deaths > 0 {
            faults.arm_abort(point, moment);
        }
        fired(&server, &faults, job, &format!("{} {}", point.name(), moment.as_str())).await;
        deaths += 1;
    }
    let done = server.ended(job).await;
    assert_eq!(
        (done.status, done.attempt),
        (JobStatus::Succeeded, deaths + 1),
        "{:?}",
        done.error
    );
    let (expected, found) = (tensors(&server, undisturbed).await, tensors(&server, job).await);
    assert!(expected.1.iter().any(|byte| *byte != 0));
    assert!(expected == found, "the adapter's bytes differ after {deaths} deaths");
    assert_eq!(losses(&server, undisturbed).await, losses(&server, job).await);
    println!(
        "died at every step of saving: {deaths} deaths at {} points (checkpoint, spool, samples, results; before, half-way, \
         after), 1 job, succeeded; adapter and {STEPS} losses byte-identical to the undisturbed run's",
        trainers_points()
            .filter(|(_, moment)| *moment == Moment::Before)
            .count()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_or_is_full_at_any_step_of_saving_costs_no_training() {
    const STEPS: u64 = 60;
    let faults = Faults::new();
    let server = real_server(&faults).await;
    let undisturbed = post(&server, STEPS).await;
    server.ended(undisturbed).await;

    // What a worker cannot write at its end, it writes in another attempt; everything before that costs none.
    let is_end = |point: Point| matches!(point, Point::WriteSample | Point::WriteResults);
    let cases: Vec<_> = trainers_points()
        .filter(|(_, moment)| *moment != Moment::After)
        .flat_map(|(point, moment)| [ENOSPC, EIO].map(|errno| (point, moment, errno)))
        .filter(|(point, _, errno)| !(is_end(*point) && *errno == EIO))
        .collect();
    let (first, moment, errno) = cases[0];
    faults.arm_error(first, moment, errno);
    let job = post(&server, STEPS).await;
    for (n, (point, moment, errno)) in cases.iter().enumerate() {
        if n > 0 {
            faults.arm_error(*point, *moment, *errno);
        }
        let what = format!("{} {} errno {errno}", point.name(), moment.as_str());
        fired(&server, &faults, job, &what).await;
        if is_end(*point) {
            // It waits, and says why.
            let reason = async || {
                let events = server.store().newest_events(job, EventKind::Status, 10).await.unwrap();
                events.iter().find_map(|event| {
                    let reason = event.data["reason"].as_str()?;
                    reason.starts_with("storage.full").then(|| reason.to_owned())
                })
            };
            let start = Instant::now();
            while reason().await.is_none() {
                assert!(start.elapsed() < PATIENCE, "{what}: the job does not wait");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        faults.disarm();
    }
    let done = server.ended(job).await;
    assert_eq!(done.status, JobStatus::Succeeded, "{:?}", done.error);
    assert!(
        tensors(&server, undisturbed).await == tensors(&server, job).await,
        "the adapter's bytes differ"
    );
    assert_eq!(losses(&server, undisturbed).await, losses(&server, job).await);
    let alerts = server.store().newest_events(job, EventKind::Alert, 1000).await.unwrap();
    let told = alerts
        .iter()
        .filter(|event| event.data["code"] == "checkpoint.not_written")
        .count();
    assert!(told > 0, "nobody was told");
    println!(
        "full and failing disk while training: {} faults (ENOSPC and EIO), {told} checkpoints left out and reported, adapter \
         byte-identical",
        cases.len()
    );
}
