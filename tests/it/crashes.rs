//! The server dies at every step that makes something durable, before and after it, and half-way through what it writes; and
//! the disk fails at each. What it has acknowledged must be there afterwards, once.
//!
//! The list is the code's own ([`lorad_faults::Point::ALL`]): a new point is covered as soon as it is declared, and one that
//! the scenario does not pass fails the test.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use lorad::{
    app::DataDir,
    domain::{JobId, JobStatus},
    store::{JobFilter, Store},
    upkeep,
};
use lorad_faults::{Moment, Owner, Point};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    chaos::lives,
    corpus::{pictures, zip},
    faults::{self, EIO, ENOSPC, Faults},
    scripted,
    server::{PATIENCE, assert_every_step, settings},
};

/// Steps of the job that ends well.
const STEPS: u64 = 8;

/// The server died while it was asked.
struct Died;

/// What a job is expected to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Succeeded,
    Cancelled,
    Failed,
}

fn is_final(job: &Value) -> bool {
    ["succeeded", "failed", "cancelled"]
        .iter()
        .any(|status| job["status"] == *status)
}

/// One data directory, and the servers that live and die on it.
struct Lane {
    base: tempfile::TempDir,
    /// Where the data directory lies now; it is moved once.
    n_moves: u32,
    faults: Faults,
    http: reqwest::Client,
    server: Option<(Child, String)>,
    n_lives: u32,
    n_scenarios: u32,
    /// Jobs by their idempotency key: every accepted one.
    accepted: BTreeMap<String, (String, Fate)>,
    /// Datasets that were acknowledged and not deleted.
    datasets: Vec<String>,
}

impl Lane {
    fn new() -> Self {
        Self {
            base: tempfile::tempdir().unwrap(),
            n_moves: 0,
            faults: Faults::new(),
            http: reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap(),
            server: None,
            n_lives: 0,
            n_scenarios: 0,
            accepted: BTreeMap::new(),
            datasets: Vec::new(),
        }
    }

    /// The folder that holds the data directory.
    fn dir(&self) -> PathBuf {
        self.base.path().join(self.n_moves.to_string())
    }

    fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    fn models(&self) -> PathBuf {
        self.data().join("models")
    }

    /// Brings the world into the state in which a point is passed at the start of a server.
    fn prepare(&mut self, point: Point) {
        match point {
            Point::MovePaths if self.dir().exists() => {
                self.stop();
                let before = self.dir();
                self.n_moves += 1;
                std::fs::rename(before, self.dir()).unwrap();
            }
            Point::UnpackModel if self.dir().exists() => {
                self.stop();
                std::fs::remove_dir_all(self.models().join("demo-icons")).unwrap();
            }
            Point::WriteSetting | Point::GiveKeysBack => self.stop(),
            _ => {}
        }
    }

    fn stop(&mut self) {
        if let Some((mut child, _)) = self.server.take() {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// Waits until a server is up, however often one dies on the way.
    async fn up(&mut self) {
        if let Some((child, _)) = &mut self.server
            && child.try_wait().unwrap().is_none()
        {
            return;
        }
        std::fs::create_dir_all(self.dir()).unwrap();
        let program = scripted::faulty_program(&self.dir(), self.faults.dir(), false);
        let settings = settings(
            &self.dir(),
            &[
                ("scheduler.worker_program", program.to_str().unwrap()),
                ("scheduler.adopt_window_ms", "500"),
                ("scheduler.lease_ms", "20000"),
                ("scheduler.max_failed_attempts", "1000"),
                ("scheduler.retry_backoff_ms", "0"),
            ],
        );
        let note = self.data().join(scripted::ADDRESS_FILE);
        let start = Instant::now();
        loop {
            let _ = std::fs::remove_file(&note);
            let mut child = scripted::server_command(&self.data(), &settings)
                .env(faults::DIR, self.faults.dir())
                .env("LORAD_MODELS__ROOTS", self.models())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            self.n_lives += 1;
            loop {
                if let Ok(address) = std::fs::read_to_string(&note) {
                    self.server = Some((child, address));
                    return;
                }
                if child.try_wait().unwrap().is_some() {
                    assert!(self.faults.has_fired(), "a server ended by itself");
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "no server comes up");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// Asks the server; it may die of that.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        key: Option<&str>,
    ) -> Result<(u16, Value), Died> {
        let (_, address) = self.server.as_ref().unwrap();
        let mut request = self.http.request(method, format!("http://{address}{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let response = request.send().await.map_err(|_| Died)?;
        let status = response.status().as_u16();
        let text = response.text().await.map_err(|_| Died)?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Posts a job whose name is its script, until the answer is certain. `None`: there is no room for it now.
    async fn submit(&mut self, key: &str, script: &Value, dataset: &str, fate: Fate) -> Result<Option<String>, Died> {
        let body = json!({
            "name": script.to_string(), "base_model": "demo-icons", "dataset_id": dataset,
            "hyperparameters": {"max_train_steps": script["steps"]}, "sampling": {"prompts": []},
        });
        // Noted before it is sent: an answer that is lost may have been a yes.
        self.accepted.insert(key.to_owned(), (body.to_string(), fate));
        let (status, answer) = self.ask(Method::POST, "/jobs", Some(&body), Some(key)).await?;
        match status {
            201 => Ok(Some(answer["id"].as_str().unwrap().to_owned())),
            409 | 500 | 507 => Ok(None),
            _ => panic!("{status} {answer:#}"),
        }
    }

    /// Reads a job until it is as wanted; gives up (`false`) when a fault that is armed has fired meanwhile.
    async fn until(&self, job: &str, wanted: impl Fn(&Value) -> bool) -> Result<bool, Died> {
        let start = Instant::now();
        loop {
            let (status, found) = self.ask(Method::GET, &format!("/jobs/{job}"), None, None).await?;
            if status == 200 && wanted(&found) {
                return Ok(true);
            }
            if self.faults.has_fired() {
                return Ok(false);
            }
            // One from an earlier scenario may have begun only now.
            self.let_go_but(job);
            assert!(start.elapsed() < PATIENCE, "{job} does not come so far: {found:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until_final(&self, job: &str) -> bool {
        self.faults.disarm();
        let _ = std::fs::remove_file(self.faults.dir().join("fired"));
        matches!(self.until(job, is_final).await, Ok(true))
    }

    /// Lets every worker go on that is held, but not those of this job.
    fn let_go_but(&self, kept: &str) {
        for job in std::fs::read_dir(self.data().join("jobs"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if job.file_name() == kept {
                continue;
            }
            let attempts = std::fs::read_dir(job.path().join("attempts")).into_iter().flatten();
            for attempt in attempts.flatten() {
                scripted::let_go(&attempt.path());
            }
        }
    }

    /// Everything that a server can be asked to store. Ends early when what is armed has fired.
    async fn scenario(&mut self) -> Result<(), Died> {
        self.let_go_but("");
        self.n_scenarios += 1;
        let n = self.n_scenarios;
        let done = |lane: &Self| lane.faults.has_fired();
        let form = reqwest::multipart::Form::new()
            .text("name", format!("upload-{n}"))
            .part(
                "file",
                reqwest::multipart::Part::bytes(zip(&pictures(2))).file_name("upload.zip"),
            );
        let (_, address) = self.server.as_ref().unwrap();
        let sent = self
            .http
            .post(format!("http://{address}/datasets"))
            .multipart(form)
            .send();
        let response = sent.await.map_err(|_| Died)?;
        let status = response.status().as_u16();
        let body: Value = response.json().await.map_err(|_| Died)?;
        let Some(dataset) = body["id"].as_str().map(str::to_owned) else {
            assert!(matches!(status, 500 | 507), "{status} {body:#}");
            return Ok(());
        };
        self.datasets.push(dataset.clone());
        let (_, all) = self.ask(Method::GET, "/datasets", None, None).await?;
        let bundled = all["data"].as_array().unwrap().iter().find(|d| d["builtin"] == true);
        let bundled = bundled.unwrap()["id"].as_str().unwrap().to_owned();

        // Refused, so that its key is given back.
        let wrong = json!({"name": "x", "base_model": "demo-icons", "dataset_id": bundled, "hyperparameters": {"lora_rank": 0}});
        self.ask(Method::POST, "/jobs", Some(&wrong), Some(&format!("wrong-{n}")))
            .await?;
        if done(self) {
            return Ok(());
        }
        // Trains, is changed, saves when told, and succeeds.
        let held = json!({"n": n, "steps": STEPS, "step_ms": 1, "checkpoint_every": 4, "hold_at": 2});
        let Some(job) = self
            .submit(&format!("good-{n}"), &held, &bundled, Fate::Succeeded)
            .await?
        else {
            return Ok(());
        };
        let notes = json!({"notes": "changed"});
        self.ask(Method::PATCH, &format!("/jobs/{job}"), Some(&notes), None)
            .await?;
        // Waits behind it, is paused, resumed and cancelled.
        let waiting = json!({"n": n, "steps": 1, "cancelled": true});
        let second = self
            .submit(&format!("waiting-{n}"), &waiting, &bundled, Fate::Cancelled)
            .await?;
        if let Some(second) = &second {
            for act in ["pause", "resume", "cancel"] {
                if done(self) {
                    return Ok(());
                }
                self.ask(Method::POST, &format!("/jobs/{second}/{act}"), None, None)
                    .await?;
            }
        }
        if !self.until(&job, |job| job["step"].as_u64() >= Some(2)).await? {
            return Ok(());
        }
        self.ask(Method::POST, &format!("/jobs/{job}/checkpoint"), None, None)
            .await?;
        self.let_go_but("");
        // Announces another file than it wrote.
        let spoilt = json!({"n": n, "steps": 1, "step_ms": 1, "spoil": true});
        let third = self
            .submit(&format!("spoilt-{n}"), &spoilt, &bundled, Fate::Failed)
            .await?;
        for id in [Some(&job), second.as_ref(), third.as_ref()].into_iter().flatten() {
            if !self.until(id, is_final).await? {
                return Ok(());
            }
        }
        if let Some(third) = &third {
            // As soon as its process is seen dead. From here on it may be gone.
            self.accepted.remove(&format!("spoilt-{n}"));
            let start = Instant::now();
            while self.ask(Method::DELETE, &format!("/jobs/{third}"), None, None).await?.0 == 409 && !done(self) {
                assert!(start.elapsed() < PATIENCE, "{third} cannot be deleted");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if done(self) {
                return Ok(());
            }
        }
        let model = json!({"id": format!("model-{n}"), "path": self.models().join("demo-icons")});
        self.ask(Method::POST, "/models", Some(&model), None).await?;
        self.ask(Method::DELETE, &format!("/models/model-{n}"), None, None)
            .await?;
        let deleted = self
            .ask(Method::DELETE, &format!("/datasets/{dataset}"), None, None)
            .await;
        self.datasets
            .retain(|id| *id != dataset || matches!(deleted, Ok((500..=599, _))));
        deleted.map(drop)
    }

    /// What must hold in the end.
    async fn settle(mut self, what: &str) -> (usize, u32) {
        self.faults.disarm();
        let start = Instant::now();
        // Each request whose answer was lost is sent again, under its key.
        let mut jobs = Vec::new();
        for (key, (body, fate)) in self.accepted.clone() {
            let body: Value = serde_json::from_str(&body).unwrap();
            let id = loop {
                self.up().await;
                match self.ask(Method::POST, "/jobs", Some(&body), Some(&key)).await {
                    Ok((201, answer)) => break answer["id"].as_str().unwrap().to_owned(),
                    _ => assert!(start.elapsed() < PATIENCE, "{what}: {key} is never accepted"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            if fate == Fate::Cancelled {
                let _ = self.ask(Method::POST, &format!("/jobs/{id}/cancel"), None, None).await;
            }
            jobs.push((id, body["name"].as_str().unwrap().to_owned(), fate));
        }
        let store = Store::open(&self.data().join("lorad.sqlite3")).await.unwrap();
        for (id, _, fate) in &jobs {
            let id: JobId = id.parse().unwrap();
            let start = Instant::now();
            let job = loop {
                self.let_go_but("");
                let job = store.job(id).await.unwrap();
                if job.status.is_final() {
                    break job;
                }
                assert!(start.elapsed() < PATIENCE, "{what}: {id} is stuck in {}", job.status);
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            let (published, _) = lives(&store, id).await;
            match fate {
                Fate::Succeeded => {
                    assert_eq!(job.status, JobStatus::Succeeded, "{what}: {:?}", job.error);
                    assert_eq!(published, 1, "{what}: published {published} times");
                    assert_every_step(&store, &job, STEPS).await;
                    let url = format!("/jobs/{id}/files/receipt.json");
                    let Ok((200, file)) = self.ask(Method::GET, &url, None, None).await else {
                        panic!("{what}: no receipt of {id}");
                    };
                    assert_eq!(file, json!({"step": STEPS}));
                }
                Fate::Cancelled => assert!(job.status.is_final()),
                Fate::Failed => assert_eq!(job.status, JobStatus::Failed, "{what}"),
            }
        }
        // Nothing doubled: as many jobs as were sent, each name once.
        let filter = JobFilter {
            limit: 1000,
            ..JobFilter::default()
        };
        let mut names: Vec<String> = store
            .jobs(&filter)
            .await
            .unwrap()
            .data
            .into_iter()
            .map(|job| job.name)
            .collect();
        names.sort();
        let n_names = names.len();
        names.dedup();
        assert_eq!(names.len(), n_names, "{what}: a job twice");
        for (_, name, _) in &jobs {
            assert!(names.contains(name), "{what}: {name} is lost");
        }
        for id in &self.datasets {
            let items = self
                .ask(Method::GET, &format!("/datasets/{id}/items"), None, None)
                .await;
            assert!(matches!(items, Ok((200, _))), "{what}: the dataset {id} is lost");
        }
        // Let the last worker end, and its attempt be settled.
        while !store.live_attempts().await.unwrap().is_empty() {
            assert!(start.elapsed() < 2 * PATIENCE, "{what}: a worker is left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.stop();
        // The start sweeps; then nothing may be left that no row names.
        self.up().await;
        self.stop();
        let findings = upkeep::fsck(&DataDir::new(self.data().canonicalize().unwrap()))
            .await
            .unwrap();
        assert!(findings.is_empty(), "{what}: {findings:#?}");
        for folder in ["tmp", "artifacts"] {
            let mut open = vec![self.data().join(folder)];
            while let Some(dir) = open.pop() {
                for entry in std::fs::read_dir(dir).unwrap().flatten() {
                    let name = entry.file_name().into_string().unwrap();
                    assert!(
                        !name.contains('#') && folder != "tmp",
                        "{what}: {name} was left in {folder}"
                    );
                    if entry.file_type().unwrap().is_dir() {
                        open.push(entry.path());
                    }
                }
            }
        }
        let n_folders = std::fs::read_dir(self.data().join("datasets")).unwrap().count();
        assert_eq!(
            n_folders,
            store.datasets().await.unwrap().len(),
            "{what}: folders and rows differ"
        );
        (jobs.len(), self.n_lives)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The server's points and moments, and the worker's last one.
fn servers_points() -> Vec<(Point, Moment)> {
    let points = Point::ALL.iter().copied();
    let mine = points.filter(|point| point.owner() == Owner::Server || *point == Point::WriteExitNote);
    mine.flat_map(|point| point.moments().iter().map(move |moment| (point, *moment)))
        .collect()
}

/// Runs the cases in lanes, side by side: servers mostly wait.
async fn in_lanes<T: Copy + Send + Sync + 'static>(
    cases: Vec<T>,
    run: impl AsyncFn(Vec<T>) -> (usize, u32) + Copy,
) -> (usize, u32) {
    const LANES: usize = 4;
    let size = cases.len().div_ceil(LANES);
    let lanes = cases.chunks(size).map(|chunk| run(chunk.to_vec()));
    let done = futures_util::future::join_all(lanes).await;
    done.into_iter()
        .fold((0, 0), |sum, lane| (sum.0 + lane.0, sum.1 + lane.1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_at_every_step_that_it_stores_loses_nothing_and_doubles_nothing() {
    let cases = servers_points();
    let n_cases = cases.len();
    let (n_jobs, n_lives) = in_lanes(cases, async |cases| {
        let mut lane = Lane::new();
        let mut what = String::new();
        lane.up().await;
        for (point, moment) in cases {
            what = format!("{} {}", point.name(), moment.as_str());
            lane.prepare(point);
            lane.faults.arm_abort(point, moment);
            let start = Instant::now();
            while !lane.faults.has_fired() {
                lane.up().await;
                if lane.faults.has_fired() {
                    break;
                }
                drop(lane.scenario().await);
                // The exit note is the last thing that a worker does.
                let passing = Instant::now();
                while !lane.faults.has_fired() && passing.elapsed() < Duration::from_secs(1) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                assert!(
                    lane.faults.has_fired() || start.elapsed() < PATIENCE,
                    "{what} is passed by nothing that a server was asked to do"
                );
            }
        }
        lane.settle(&what).await
    })
    .await;
    println!(
        "died at every step that the server stores: {n_cases} deaths at {} points, {n_lives} server starts, {n_jobs} jobs: 0 \
         lost, 0 doubled, 0 stuck, 0 files left",
        servers_points()
            .iter()
            .filter(|(_, moment)| *moment == Moment::Before)
            .count()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_at_any_step_that_the_server_stores_costs_nothing_that_was_acknowledged() {
    let mut cases = Vec::new();
    for (point, moment) in servers_points() {
        // At the start a server that cannot write refuses to start; here they fail under a running one.
        let at_start = matches!(
            point,
            Point::MovePaths | Point::UnpackModel | Point::WriteSetting | Point::GiveKeysBack
        );
        if moment != Moment::After && !at_start {
            cases.extend([(point, moment, ENOSPC), (point, moment, EIO)]);
        }
    }
    let n_cases = cases.len();
    let (n_jobs, n_lives) = in_lanes(cases, async |cases| {
        let mut lane = Lane::new();
        let mut what = String::new();
        lane.up().await;
        for (point, moment, errno) in cases {
            what = format!("{} {} errno {errno}", point.name(), moment.as_str());
            lane.faults.arm_error(point, moment, errno);
            let start = Instant::now();
            while !lane.faults.has_fired() {
                let life = lane.scenario().await;
                assert!(life.is_ok(), "{what}: the server died");
                let passing = Instant::now();
                while !lane.faults.has_fired() && passing.elapsed() < Duration::from_secs(1) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                assert!(
                    lane.faults.has_fired() || start.elapsed() < PATIENCE,
                    "{what} is passed by nothing that a server was asked to do"
                );
            }
            // While the disk fails, the server answers.
            assert!(
                matches!(lane.ask(Method::GET, "/readyz", None, None).await, Ok((200, _))),
                "{what}"
            );
            lane.faults.disarm();
        }
        lane.settle(&what).await
    })
    .await;
    println!(
        "full and failing disk under a server: {n_cases} faults (ENOSPC and EIO), {n_lives} server processes, {n_jobs} jobs: 0 \
         lost, 0 doubled, 0 stuck"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_paused_cancelled_and_deleted_on_a_full_disk_at_the_price_of_the_ballast() {
    let mut lane = Lane::new();
    lane.up().await;
    let ballast = lane.data().join("ballast");
    let (_, all) = lane.ask(Method::GET, "/datasets", None, None).await.ok().unwrap();
    let dataset = all["data"][0]["id"].as_str().unwrap().to_owned();
    let held = json!({"n": 1, "steps": STEPS, "hold_at": 2});
    let first = lane
        .submit("held", &held, &dataset, Fate::Cancelled)
        .await
        .ok()
        .unwrap()
        .unwrap();
    let waiting = json!({"n": 2, "steps": 1});
    let second = lane
        .submit("waiting", &waiting, &dataset, Fate::Cancelled)
        .await
        .ok()
        .unwrap()
        .unwrap();
    for (point, method, path) in [
        (Point::PauseJob, Method::POST, format!("/jobs/{second}/pause")),
        (Point::CancelJob, Method::POST, format!("/jobs/{second}/cancel")),
        (Point::DeleteJob, Method::DELETE, format!("/jobs/{second}")),
    ] {
        let start = Instant::now();
        while !ballast.exists() {
            assert!(start.elapsed() < PATIENCE, "the ballast is not made again");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        lane.faults.arm_error_once(point, Moment::Before, ENOSPC);
        let (status, answer) = lane.ask(method, &path, None, None).await.ok().unwrap();
        assert!(lane.faults.has_fired(), "{path} did not pass {}", point.name());
        assert!((200..300).contains(&status), "{path}: {status} {answer:#}");
    }
    let cancel = format!("/jobs/{first}/cancel");
    let force = json!({"mode": "force"});
    lane.ask(Method::POST, &cancel, Some(&force), None).await.ok().unwrap();
    assert!(lane.until_final(&first).await, "{first} is not cancelled");
}

/// The binary that users run has no switch for faults.
#[tokio::test(flavor = "multi_thread")]
async fn the_program_that_ships_cannot_be_armed() {
    let faults = Faults::new();
    faults.arm_abort(Point::WriteSetting, Moment::Before);
    let data = faults.dir().join("data");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lorad"))
        .args(["serve", "--bind", "127.0.0.1:0"])
        .env("LORAD_STORAGE__DATA_DIR", &data)
        .env(faults::DIR, faults.dir())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    // It has passed the point when its workers' socket is there.
    while !data.join("agent.sock").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it obeyed");
        assert!(start.elapsed() < PATIENCE, "it does not start");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!faults.has_fired());
    child.kill().unwrap();
    child.wait().unwrap();
}
