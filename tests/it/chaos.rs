//! Kills in a loop, at moments drawn from a seed, and what must hold afterwards. Each failure names its seed;
//! `LORAD_TEST_SEED` plays it again, `LORAD_TEST_KILLS` makes the loops longer.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use lorad::{
    domain::{Change, EventKind, Job, JobId, JobStatus, now_ms},
    store::Store,
};
use lorad_proto::{
    command::EventsPost,
    event::{Envelope, Level, WorkerEvent},
};
use serde_json::{Value, json};

use crate::{
    recovery::prepared,
    scripted::let_go,
    server::{PATIENCE, ServerProcess, TestServer, assert_every_step, kill_9, scripted_job, settings, signal, wait},
};

/// Numbers from a seed (splitmix64).
pub struct Draws(u64);

impl Draws {
    /// From `LORAD_TEST_SEED`, else from the clock; said aloud, so that a failure shows it.
    pub fn new() -> Self {
        let seed = std::env::var("LORAD_TEST_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| now_ms().unsigned_abs());
        println!("LORAD_TEST_SEED={seed}");
        Self(seed)
    }

    /// Others from the same seed, for what is done at the same time.
    pub fn split(&mut self) -> Self {
        Self(self.within(0..u64::MAX))
    }

    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        range.start + (z ^ (z >> 31)) % (range.end - range.start)
    }
}

/// How often something is done: so often as the variable says, or as a quick run does it.
pub fn times(variable: &str, quick: usize) -> usize {
    let given = std::env::var(variable).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(quick)
}

fn kills(quick: usize) -> usize {
    times("LORAD_TEST_KILLS", quick)
}

/// What the job's own events say of its life: each change starts where the last one ended and is one that the state
/// machine knows. How often it succeeded and how often it was interrupted.
pub async fn lives(store: &Store, job: JobId) -> (usize, usize) {
    let mut at = None;
    let mut n = BTreeMap::<String, usize>::new();
    for event in store.events_after(job, 0, 100_000).await.unwrap() {
        if event.kind != EventKind::Status {
            continue;
        }
        let to = JobStatus::parse(event.data["to"].as_str().unwrap()).unwrap();
        if let Some(from) = event.data["from"].as_str().and_then(JobStatus::parse) {
            assert_eq!(at, Some(from), "{job}: a change from a state that it was not in");
            let known = Change::ALL.iter().any(|change| from.next(*change) == Ok(to));
            assert!(known, "{job}: {from} -> {to} is no transition");
        }
        at = Some(to);
        *n.entry(to.to_string()).or_default() += 1;
    }
    let count = |status: &str| n.get(status).copied().unwrap_or(0);
    (count("succeeded"), count("interrupted"))
}

/// The last step that a worker made, by its spool.
fn last_step(attempt_dir: &std::path::Path) -> u64 {
    let spool = std::fs::read_to_string(attempt_dir.join("events.jsonl")).unwrap();
    let events = spool
        .lines()
        .filter_map(|line| serde_json::from_str::<Envelope>(line).ok());
    let steps = events.filter_map(|envelope| match envelope.event {
        WorkerEvent::Step(step) => Some(step.step),
        _ => None,
    });
    steps.max().unwrap_or(0)
}

/// Sometimes kills the worker too, if it has something to resume from: three deaths without make a broken job.
async fn kill_a_worker(store: &Store, draws: &mut Draws) -> bool {
    let Some(attempt) = store.live_attempts().await.unwrap().into_iter().next() else {
        return false;
    };
    let checkpoints = store.checkpoints(attempt.job_id).await.unwrap();
    let can_resume = checkpoints
        .iter()
        .any(|checkpoint| checkpoint.attempt == attempt.attempt);
    let (Some(pid), true, 0) = (attempt.pid, can_resume, draws.within(0..3)) else {
        return false;
    };
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // It may just have ended by itself.
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_again_and_again_loses_nothing_and_publishes_once() {
    let mut draws = Draws::new();
    let n_kills = kills(50);
    let dir = tempfile::tempdir().unwrap();
    let script = |step_ms: u64| json!({"steps": 30, "step_ms": step_ms, "checkpoint_every": 10});
    let (store, first) = prepared(dir.path(), script(5)).await;
    // A job that was claimed and whose worker was never started waits for the window of the server that stays.
    let settings = settings(dir.path(), &[("scheduler.adopt_window_ms", "1500")]);
    let (mut accepted, mut workers) = (vec![first.id], 0);
    for _ in 0..n_kills {
        let server = ServerProcess::spawn(dir.path(), &settings);
        let job = scripted_job(first.dataset_id, &script(draws.within(1..12)));
        accepted.push(store.insert_job(&job, None).await.unwrap().id);
        tokio::time::sleep(Duration::from_millis(draws.within(50..900))).await;
        server.kill();
        workers += usize::from(kill_a_worker(&store, &mut draws).await);
    }
    let in_loop = store.job_counts().await.unwrap();
    let last = ServerProcess::start(dir.path(), &settings).await;
    let (mut attempts, mut succeeded) = (0, 0);
    for id in &accepted {
        let job = wait(&store, *id, "the end", |job| job.status.is_final()).await;
        assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
        assert_every_step(&store, &job, 30).await;
        let (published, _) = lives(&store, *id).await;
        assert_eq!(published, 1, "{id} was published {published} times");
        let url = format!("http://{}/jobs/{id}/files/receipt.json", last.address);
        let file: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
        assert_eq!(file, json!({"step": 30}));
        attempts += job.attempt;
        succeeded += 1;
    }
    last.kill();
    println!(
        "server kill loop: {n_kills} kills (with {workers} of workers), {} jobs accepted, {succeeded} succeeded ({in_loop:?} after the last kill), \
         0 lost, 0 stuck, 0 illegal transitions, 0 published twice, {attempts} attempts",
        accepted.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_killed_again_and_again_lose_at_most_one_interval_and_every_job_succeeds() {
    const INTERVAL: u64 = 5;
    let mut draws = Draws::new();
    let (n_kills, server) = (kills(30), TestServer::start().await);
    let store = server.store();
    let (mut noticed_ms, mut most_lost, mut n_jobs) = (Vec::new(), 0, 0);
    while noticed_ms.len() < n_kills {
        let job = server
            .post(json!({"steps": 250, "step_ms": 2, "checkpoint_every": INTERVAL}))
            .await;
        n_jobs += 1;
        let mut killed = 0;
        for attempt in 1..=6 {
            // Without a new checkpoint three deaths make a broken job; that is another test's affair.
            let begun = async || {
                let checkpoints = store.checkpoints(job.id).await.unwrap();
                checkpoints.iter().any(|checkpoint| checkpoint.attempt == attempt)
            };
            while !begun().await && !store.job(job.id).await.unwrap().status.is_final() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tokio::time::sleep(Duration::from_millis(draws.within(0..120))).await;
            let now = store.job(job.id).await.unwrap();
            if now.status != JobStatus::Running || now.attempt != attempt {
                break;
            }
            killed += 1;
            let killed_at = now_ms();
            kill_9(store.attempt(job.id, attempt).await.unwrap().pid.unwrap());
            let start = Instant::now();
            let ended = loop {
                if let Some(at) = store.attempt(job.id, attempt).await.unwrap().ended_at_ms {
                    break at;
                }
                assert!(start.elapsed() < PATIENCE, "the death was never noticed");
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            noticed_ms.push(ended - killed_at);
        }
        let done = server.ended(job.id).await;
        assert_eq!(done.status, JobStatus::Succeeded, "{:?}", done.error);
        assert_every_step(store, &done, 250).await;
        let (published, interrupted) = lives(store, job.id).await;
        assert_eq!(published, 1);
        // A worker that had finished when the signal came was not interrupted.
        assert!(interrupted <= killed && interrupted + 1 >= killed);
        let rows = store.metrics(job.id, 0, 250).await.unwrap();
        for attempt in 1..done.attempt {
            let trained = last_step(&store.attempt(job.id, attempt).await.unwrap().dir);
            if let Some(first) = rows.iter().find(|row| row.attempt == attempt + 1) {
                let lost = (trained + 1).saturating_sub(first.step);
                assert!(
                    lost <= INTERVAL,
                    "attempt {attempt} trained to {trained}; {lost} of that is lost"
                );
                most_lost = most_lost.max(lost);
            }
        }
    }
    noticed_ms.sort_unstable();
    println!(
        "worker kill loop: {} kills, {n_jobs} jobs, all succeeded; noticed after {} ms (median), {} ms (slowest); at most \
         {most_lost} steps repeated, {INTERVAL} allowed",
        noticed_ms.len(),
        noticed_ms[noticed_ms.len() / 2],
        noticed_ms[noticed_ms.len() - 1]
    );
}

/// The worker of attempt 1 is not quite dead: it goes on posting when attempt 2 owns the job.
#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_is_fenced_and_changes_nothing() {
    let server = TestServer::start().await;
    let store = server.store();
    let job = server
        .post(json!({"steps": 20, "step_ms": 1, "hold_at": 10, "held_attempts": 2}))
        .await;
    // Running: until an attempt says hello, the job shows the step of the one before.
    let held = |attempt| move |job: &Job| job.attempt == attempt && job.status == JobStatus::Running && job.step == 10;
    server.wait(job.id, "the first attempt", held(1)).await;
    let first = store.attempt(job.id, 1).await.unwrap();
    let environment = std::fs::read(format!("/proc/{}/environ", first.pid.unwrap())).unwrap();
    let token = String::from_utf8_lossy(&environment)
        .split('\0')
        .find_map(|pair| pair.strip_prefix("LORAD_ATTEMPT_TOKEN=").map(str::to_owned))
        .unwrap();
    kill_9(first.pid.unwrap());
    server.wait(job.id, "the second attempt", held(2)).await;

    let client = reqwest::Client::builder()
        .unix_socket(server.handle.app().data.agent_socket())
        .build()
        .unwrap();
    let before = store.events_after(job.id, 0, 1000).await.unwrap();
    let n_posts = times("LORAD_TEST_ZOMBIE_POSTS", 40) / 2;
    let mut fenced = 0;
    for n in 0..n_posts {
        let event = match n % 3 {
            0 => WorkerEvent::Log {
                level: Level::Info,
                message: "braaains".to_owned(),
            },
            1 => WorkerEvent::Checkpoint {
                step: 11,
                dir: "00000011".to_owned(),
                bytes: 1,
                sha256: "0".repeat(64),
            },
            _ => WorkerEvent::Failed {
                problem: lorad_proto::problem::Problem::new("x", "x", "x"),
            },
        };
        let post = EventsPost {
            token: token.clone(),
            events: vec![Envelope {
                seq: first.acked_seq + 1,
                t_ms: now_ms(),
                event,
            }],
        };
        // Also under the number of the attempt that owns the job: the token is the first one's.
        for attempt in [1, 2] {
            let url = format!("http://lorad/internal/attempts/{}/{attempt}/events", job.id);
            let status = client.post(url).json(&post).send().await.unwrap().status();
            fenced += usize::from(status == 409);
        }
    }
    assert_eq!(fenced, 2 * n_posts);
    assert_eq!(store.events_after(job.id, 0, 1000).await.unwrap(), before);
    let_go(&store.attempt(job.id, 2).await.unwrap().dir);
    let done = server.ended(job.id).await;
    assert_eq!((done.status, done.attempt), (JobStatus::Succeeded, 2));
    assert_every_step(store, &done, 20).await;
    println!("zombie: {fenced} of {} posts fenced, 0 rows changed", 2 * n_posts);
}

/// A worker that hears and says nothing (stopped by a signal, stuck in a driver) past its lease is killed, and only its
/// death frees its device.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_frozen_past_its_lease_is_killed_and_its_job_goes_on() {
    let server = TestServer::with(&[
        ("scheduler.lease_ms", "2000"),
        ("scheduler.lease_grace_ms", "0"),
        ("scheduler.adopt_window_ms", "0"),
        ("scheduler.kill_grace_ms", "300"),
    ])
    .await;
    let job = server
        .post(json!({"steps": 20, "step_ms": 1, "checkpoint_every": 5, "hold_at": 10}))
        .await;
    server.wait(job.id, "the hold", |job| job.step == 10).await;
    let pid = server.store().attempt(job.id, 1).await.unwrap().pid.unwrap();
    signal(pid, rustix::process::Signal::STOP);
    let done = server.ended(job.id).await;
    assert_eq!((done.status, done.attempt), (JobStatus::Succeeded, 2));
    assert_every_step(server.store(), &done, 20).await;
    let first = server.store().attempt(job.id, 1).await.unwrap();
    let second = server.store().attempt(job.id, 2).await.unwrap();
    assert!(
        first.ended_at_ms.unwrap() <= second.started_at_ms,
        "two attempts shared a device"
    );
    let rows = server.store().metrics(job.id, 0, 20).await.unwrap();
    assert!(rows[9].attempt == 1 && rows[10].attempt == 2, "it did not resume");
}

/// The adapter's tensors as they lie in a job's diffusers file, without the metadata, which holds times.
pub async fn tensors(server: &TestServer, job: JobId) -> (Value, Vec<u8>) {
    let url = server.url(&format!("/jobs/{job}/files/pytorch_lora_weights.safetensors"));
    let bytes = reqwest::get(url).await.unwrap().bytes().await.unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header.as_object_mut().unwrap().remove("__metadata__");
    (header, bytes[8 + length..].to_vec())
}

/// How runs of the trainer itself compare.
#[derive(Debug, Default)]
struct Compared {
    undisturbed: usize,
    killed: usize,
    kills: usize,
    /// Of these, while a checkpoint was being written.
    while_saving: usize,
}

/// Everything of a run that must not depend on whether it was disturbed: the published tensors, adapter and optimizer as they are
/// in the last checkpoint, and the losses to the last bit.
async fn outcome(server: &TestServer, job: JobId) -> (Value, Vec<Vec<u8>>, Vec<Option<u64>>) {
    let done = server.ended(job).await;
    assert_eq!(done.status, JobStatus::Succeeded, "{:?}", done.error);
    let (header, published) = tensors(server, job).await;
    assert!(published.iter().any(|byte| *byte != 0));
    let last = server.store().checkpoints(job).await.unwrap().remove(0);
    assert_eq!(last.step, done.step);
    let saved =
        ["adapter.safetensors", "optimizer.safetensors"].map(|name| std::fs::read(last.path.join(name)).unwrap());
    let rows = server.store().metrics(job, 0, 1000).await.unwrap();
    let losses = rows.iter().map(|row| row.loss.map(f64::to_bits)).collect();
    (header, [vec![published], saved.to_vec()].concat(), losses)
}

/// Kills a worker as soon as it has begun to write a checkpoint. Whether it died in the middle of that.
fn kill_while_saving(attempt_dir: &std::path::Path, pid: u32) -> bool {
    let is_saving = || {
        let mut entries = std::fs::read_dir(attempt_dir.join("checkpoints"))
            .into_iter()
            .flatten()
            .flatten();
        entries.any(|entry| entry.file_name().to_string_lossy().starts_with(".tmp-"))
    };
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    while !is_saving() {
        if rustix::process::test_kill_process(pid).is_err() {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    if rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_err() {
        return false;
    }
    while rustix::process::test_kill_process(pid).is_ok() {
        std::thread::sleep(Duration::from_micros(200));
    }
    is_saving()
}

/// Runs of one job with so many threads: some undisturbed, the others killed twice, at a moment that is drawn or while it saves.
async fn compare(threads: &str, mut draws: Draws, n_undisturbed: usize, n_killed: usize) -> Compared {
    // Many more than a worker makes between two posts, by which it is seen where it is.
    const STEPS: u64 = 40;
    let server = TestServer::with(&[
        ("scheduler.worker_program", env!("CARGO_BIN_EXE_lorad")),
        ("scheduler.threads", threads),
        ("scheduler.heartbeat_ms", "100"),
        ("scheduler.max_failed_attempts", "1000"),
        ("scheduler.retry_backoff_ms", "0"),
    ])
    .await;
    let dataset = server.store().dataset_by_name("silhouettes").await.unwrap().unwrap();
    let request = json!({
        "name": "same", "base_model": "demo-icons", "dataset_id": dataset.id,
        "hyperparameters": {"max_train_steps": STEPS, "batch_size": 1, "lora_rank": 2, "checkpoint_every_steps": 1,
            "seed": draws.within(0..1 << 32)},
    });
    let client = reqwest::Client::new();
    let post = async || -> JobId {
        let posted = client.post(server.url("/jobs")).json(&request).send().await.unwrap();
        let body: Value = posted.json().await.unwrap();
        body["id"]
            .as_str()
            .unwrap_or_else(|| panic!("{body:#}"))
            .parse()
            .unwrap()
    };
    let mut compared = Compared::default();
    let expected = outcome(&server, post().await).await;
    compared.undisturbed += 1;
    for _ in 1..n_undisturbed {
        assert!(
            outcome(&server, post().await).await == expected,
            "{threads} threads: two undisturbed runs differ"
        );
        compared.undisturbed += 1;
    }
    for n in 0..n_killed {
        let job = post().await;
        let mut at = Vec::new();
        for attempt in 1..=2_u32 {
            // Early enough that it cannot end before the signal comes.
            let step = draws.within(0..5) + u64::from(attempt - 1) * 4;
            let reached = |job: &Job| job.attempt == attempt && job.status == JobStatus::Running && job.step >= step;
            server.wait(job, "the step to die at", reached).await;
            let worker = server.store().attempt(job, attempt).await.unwrap();
            let (dir, pid) = (worker.dir, worker.pid.unwrap());
            if (n + attempt as usize).is_multiple_of(2) {
                let saving = tokio::task::spawn_blocking(move || kill_while_saving(&dir, pid))
                    .await
                    .unwrap();
                compared.while_saving += usize::from(saving);
                at.push(format!("{step} (saving: {saving})"));
            } else {
                tokio::time::sleep(Duration::from_micros(draws.within(0..25_000))).await;
                kill_9(pid);
                at.push(step.to_string());
            }
            compared.kills += 1;
        }
        let found = outcome(&server, job).await;
        let kills = at.join(", ");
        assert_eq!(
            expected.0, found.0,
            "{threads} threads, killed after {kills}: other tensors"
        );
        assert!(
            expected.1 == found.1,
            "{threads} threads, killed after {kills}: the bytes differ"
        );
        assert_eq!(expected.2, found.2, "{threads} threads, killed after {kills}");
        assert_eq!(
            server.store().job(job).await.unwrap().attempt,
            3,
            "killed after {kills}"
        );
        compared.killed += 1;
    }
    compared
}

/// The trainer itself, on the bundled base and data. `LORAD_TEST_RESUMES`: how many runs are killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_killed_twice_gives_the_bytes_of_one_that_was_not() {
    let mut draws = Draws::new();
    let n_killed = times("LORAD_TEST_RESUMES", 10);
    // With 30 of them ten undisturbed ones for each number of threads, else three.
    let n_undisturbed = (n_killed / 3).clamp(3, 10);
    let (one, two) = tokio::join!(
        compare("1", draws.split(), n_undisturbed, n_killed / 2),
        compare("2", draws.split(), n_undisturbed, n_killed.div_ceil(2)),
    );
    let both = |of: fn(&Compared) -> usize| of(&one) + of(&two);
    let while_saving = both(|compared| compared.while_saving);
    assert!(while_saving > 0, "no worker died while it saved");
    println!(
        "byte-identical resume: {} of {n_killed} runs equal after {} kills, {while_saving} of them while a checkpoint was being written; \
         {} undisturbed runs equal; 1 and 2 threads; adapter, optimizer and losses",
        both(|compared| compared.killed),
        both(|compared| compared.kills),
        both(|compared| compared.undisturbed),
    );
}

/// The real binary, as a service manager ends it: a job trains, a viewer watches.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_server_in_time_and_leaves_its_worker_alone() {
    use std::io::BufRead as _;
    let dir = tempfile::tempdir().unwrap();
    let data: PathBuf = dir.path().join("data");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lorad"))
        .args(["serve", "--bind", "127.0.0.1:0"])
        .env("LORAD_STORAGE__DATA_DIR", &data)
        .env("LORAD_SCHEDULER__HEARTBEAT_MS", "200")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut url = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut url)
        .unwrap();
    let url = url.trim();
    let client = reqwest::Client::new();
    let mut job: Value = client
        .get(format!("{url}/demo"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    job["sampling"] = json!({"prompts": []});
    let posted = client.post(format!("{url}/jobs")).json(&job).send().await.unwrap();
    let id: JobId = posted.json::<Value>().await.unwrap()["id"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let store = Store::open(&data.join("lorad.sqlite3")).await.unwrap();
    wait(&store, id, "training", |job| job.step >= 1).await;
    let stream = client.get(format!("{url}/jobs/{id}/events")).send().await.unwrap();
    let pid = store.attempt(id, 1).await.unwrap().pid.unwrap();

    let asked = Instant::now();
    signal(child.id(), rustix::process::Signal::TERM);
    let watched = tokio::spawn(async move { stream.bytes().await });
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap())
        .await
        .unwrap();
    let took = asked.elapsed();
    println!("SIGTERM while a job trains and a viewer watches: exit after {took:?}");
    assert_eq!(status.code(), Some(0));
    assert!(took < Duration::from_secs(30), "{took:?}");
    let text = watched.await.unwrap().unwrap();
    assert!(
        String::from_utf8_lossy(&text).contains("event: bye"),
        "the viewer was not told"
    );
    let worker = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    assert!(
        rustix::process::test_kill_process(worker).is_ok(),
        "the worker went with its server"
    );
    kill_9(pid);
}
