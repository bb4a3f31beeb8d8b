//! The power is cut at a moment drawn from a seed, and what was acknowledged must be on the disk. `LORAD_TEST_SEED` plays the
//! draws again, `LORAD_TEST_CUTS` makes the loop longer.
//!
//! The [`machine`](crate::machine) runs the program that ships, with its real workers, on a disk of its own.
//!
//! A test that cannot fail proves nothing: [`a_cut_keeps_what_was_flushed_and_nothing_else`] looks at the method itself, and
//! [`a_program_that_leaves_out_one_kind_of_flush_is_seen_to_lose_it`] takes each kind of flush away from the program.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use lorad::domain::{Change, JobStatus};
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    chaos::{Draws, times},
    corpus::{pictures, zip},
    machine::{Disk, Machine},
    server::PATIENCE,
};

/// Optimizer steps of a job that ends.
const STEPS: u64 = 6;

/// How often something must be seen to be lost: someone else's `sync` writes everything of every file system.
const TRIES: usize = 3;

/// Before a new disk is taken.
const CUTS_PER_DISK: u64 = 20;

/// Most jobs that one life of the machine is given.
const JOBS_PER_LIFE: usize = 2;

/// A stored event of a job as a viewer sees it.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    kind: String,
    data: Value,
}

/// The server of one life.
#[derive(Clone)]
struct Server {
    url: String,
    http: reqwest::Client,
}

impl Server {
    /// Waits until it is up. `None`: it ended.
    fn of(machine: &mut Machine) -> Option<Self> {
        let url = Some(machine.line()).filter(|line| !line.is_empty())?;
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Some(Self { url, http })
    }

    /// `None`: no whole answer came.
    async fn ask(&self, method: Method, path: &str, body: Option<&Value>, key: Option<&str>) -> Option<(u16, Value)> {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        if let Some(body) = body {
            request = request.json(body);
        }
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        let text = response.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let answer = self.ask(Method::GET, path, None, None).await;
        answer.unwrap_or_else(|| panic!("GET {path} was not answered"))
    }

    async fn upload(&self, name: &str) -> Option<(u16, Value)> {
        let file = reqwest::multipart::Part::bytes(zip(&pictures(2))).file_name("upload.zip");
        let form = reqwest::multipart::Form::new()
            .text("name", name.to_owned())
            .part("file", file);
        let sent = self.http.post(format!("{}/datasets", self.url)).multipart(form).send();
        let response = sent.await.ok()?;
        let status = response.status().as_u16();
        Some((status, response.json().await.ok()?))
    }

    /// Hands on each stored event of a job from its first, until the stream ends or `take` has enough.
    async fn watch(&self, job: &str, mut take: impl FnMut(u64, Seen) -> bool) {
        let url = format!("{}/jobs/{job}/events?after=0", self.url);
        let Ok(response) = self.http.get(url).send().await else {
            return;
        };
        let (mut body, mut rest) = (response.bytes_stream(), Vec::new());
        while let Some(Ok(chunk)) = body.next().await {
            rest.extend_from_slice(&chunk);
            // Whole blocks only: an event that broke off was not seen.
            while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
                let block = String::from_utf8(rest.drain(..end + 2).collect()).unwrap();
                let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
                if let (Some(id), Some(kind), Some(data)) = (field("id: "), field("event: "), field("data: ")) {
                    let seen = Seen {
                        kind: kind.to_owned(),
                        data: serde_json::from_str(data).unwrap(),
                    };
                    if !take(id.parse().unwrap(), seen) {
                        return;
                    }
                }
            }
        }
    }
}

/// A job that was sent, under its key.
#[derive(Debug, Clone)]
struct Sent {
    body: Value,
    /// Once it was acknowledged.
    id: Option<String>,
    /// What its notes may be: what was acknowledged last, and what was sent since.
    notes: Vec<String>,
    /// A cancel was sent, and whether it was acknowledged.
    cancel: Option<bool>,
    /// Every stored event that a viewer has seen.
    events: BTreeMap<u64, Seen>,
}

/// Everything that was acknowledged to anyone.
#[derive(Debug, Default)]
struct Ledger {
    jobs: BTreeMap<String, Sent>,
    datasets: BTreeSet<String>,
    deleted: BTreeSet<String>,
    n_acknowledged: u64,
}

impl Ledger {
    fn sent(&mut self, key: &str) -> &mut Sent {
        self.jobs.get_mut(key).unwrap()
    }
}

type Shared = Arc<Mutex<Ledger>>;

/// A job of a few steps.
async fn a_job(server: &Server, name: &str, steps: u64) -> Option<Value> {
    let (_, mut job) = server.ask(Method::GET, "/demo", None, None).await?;
    job["name"] = json!(name);
    job["hyperparameters"] = json!({"max_train_steps": steps, "batch_size": 1, "lora_rank": 2, "checkpoint_every_steps": 1,
        "keep_checkpoints": 2});
    job["sampling"] = json!({"prompts": ["silhouette icon of key"], "num_inference_steps": 1});
    Some(job)
}

/// Posts a job under its key until there is an answer.
async fn post(server: &Server, ledger: &Shared, key: &str, body: Value) -> Option<String> {
    let sent = Sent {
        body: body.clone(),
        id: None,
        notes: vec![String::new()],
        cancel: None,
        events: BTreeMap::new(),
    };
    // Noted before it is sent: an answer that is lost may have been a yes.
    ledger.lock().unwrap().jobs.entry(key.to_owned()).or_insert(sent);
    let (status, answer) = server.ask(Method::POST, "/jobs", Some(&body), Some(key)).await?;
    assert_eq!(status, 201, "{answer:#}");
    let id = answer["id"].as_str().unwrap().to_owned();
    let mut ledger = ledger.lock().unwrap();
    ledger.sent(key).id = Some(id.clone());
    ledger.n_acknowledged += 1;
    Some(id)
}

/// Notes a job's events as a viewer until the stream ends.
async fn view(server: Server, ledger: Shared, key: String, id: String) {
    let note = |seq, seen: Seen| {
        let mut ledger = ledger.lock().unwrap();
        let before = ledger.sent(&key).events.insert(seq, seen.clone());
        assert!(
            before.is_none_or(|before| before == seen),
            "{id}: event {seq} is another one now"
        );
        true
    };
    server.watch(&id, note).await;
}

/// Someone who asks for everything that a server stores, in an order that is drawn.
struct User {
    server: Server,
    ledger: Shared,
    draws: Draws,
    life: u64,
    n_acts: usize,
    n_jobs: usize,
    viewers: tokio::task::JoinSet<()>,
}

impl User {
    fn new(server: Server, ledger: Shared, draws: Draws, life: u64) -> Self {
        Self {
            server,
            ledger,
            draws,
            life,
            n_acts: 0,
            n_jobs: 0,
            viewers: tokio::task::JoinSet::new(),
        }
    }

    /// Goes on until the server does not answer, and until every viewer has read what was on its way.
    async fn work(mut self) {
        for (key, id) in self.known() {
            self.watch(key, id);
        }
        while self.act().await.is_some() {
            let pause = self.draws.within(0..40);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        while let Some(viewer) = self.viewers.join_next().await {
            viewer.unwrap();
        }
    }

    /// Keys and ids of the jobs that were acknowledged.
    fn known(&self) -> Vec<(String, String)> {
        let ledger = self.ledger.lock().unwrap();
        let known = ledger.jobs.iter();
        known
            .filter_map(|(key, sent)| Some((key.clone(), sent.id.clone()?)))
            .collect()
    }

    fn watch(&mut self, key: String, id: String) {
        let viewer = view(self.server.clone(), self.ledger.clone(), key, id);
        self.viewers.spawn(viewer);
    }

    fn acknowledged(&self, note: impl FnOnce(&mut Ledger)) {
        let mut ledger = self.ledger.lock().unwrap();
        ledger.n_acknowledged += 1;
        note(&mut ledger);
    }

    /// `None`: the server did not answer.
    async fn act(&mut self) -> Option<()> {
        self.n_acts += 1;
        let name = format!("{}-{}", self.life, self.n_acts);
        let known = self.known();
        let any = self.draws.within(0..known.len().max(1) as u64);
        let any = known.get(usize::try_from(any).unwrap());
        match self.draws.within(0..10) {
            0..=2 if self.n_jobs < JOBS_PER_LIFE => {
                self.n_jobs += 1;
                let body = a_job(&self.server, &name, STEPS).await?;
                let id = post(&self.server, &self.ledger, &name, body).await?;
                self.watch(name, id);
            }
            3..=5 => {
                let (status, answer) = self.server.upload(&name).await?;
                assert_eq!(status, 201, "{answer:#}");
                let id = answer["id"].as_str().unwrap().to_owned();
                self.acknowledged(|ledger| _ = ledger.datasets.insert(id));
            }
            6 => {
                // From here on it may be gone.
                let Some(id) = self.ledger.lock().unwrap().datasets.pop_first() else {
                    return Some(());
                };
                let path = format!("/datasets/{id}");
                let (status, answer) = self.server.ask(Method::DELETE, &path, None, None).await?;
                assert_eq!(status, 204, "{answer:#}");
                self.acknowledged(|ledger| _ = ledger.deleted.insert(id));
            }
            7 if known.len() > 4 && self.draws.within(0..3) == 0 => {
                let (key, id) = any?;
                self.ledger.lock().unwrap().sent(key).cancel.get_or_insert(false);
                let path = format!("/jobs/{id}/cancel");
                let (status, answer) = self.server.ask(Method::POST, &path, None, None).await?;
                // 409: it is over.
                assert!(matches!(status, 202 | 409), "{status} {answer:#}");
                if status == 202 {
                    self.acknowledged(|ledger| ledger.sent(key).cancel = Some(true));
                }
            }
            _ => {
                let Some((key, id)) = any else { return Some(()) };
                self.ledger.lock().unwrap().sent(key).notes.push(name.clone());
                let (path, body) = (format!("/jobs/{id}"), json!({"notes": name}));
                let (status, answer) = self.server.ask(Method::PATCH, &path, Some(&body), None).await?;
                assert_eq!(status, 200, "{answer:#}");
                self.acknowledged(|ledger| ledger.sent(key).notes = vec![name]);
            }
        }
        Some(())
    }
}

/// What was acknowledged and is not there, or not as it was, and what `lorad fsck` finds: one line each.
async fn lost(server: &Server, ledger: &Shared, disk: &Disk, machine: &Machine) -> Vec<String> {
    let mut lost = disk.findings();
    let data = machine.inside(&disk.data());
    let (jobs, datasets, deleted) = {
        let ledger = ledger.lock().unwrap();
        (ledger.jobs.clone(), ledger.datasets.clone(), ledger.deleted.clone())
    };
    for (key, sent) in &jobs {
        let Some(id) = &sent.id else { continue };
        let (status, job) = server.get(&format!("/jobs/{id}")).await;
        if status != 200 {
            lost.push(format!("job {key}: {status}"));
            continue;
        }
        let notes = job["notes"].as_str().unwrap();
        if !sent.notes.iter().any(|sent| sent == notes) {
            lost.push(format!(
                "job {key}: its notes are {notes:?}, not one of {:?}",
                sent.notes
            ));
        }
        let is_over = is_final(&job);
        if sent.cancel == Some(true) && !is_over && !job["desired"].as_str().unwrap().starts_with("cancel") {
            lost.push(format!("job {key}: its cancel is forgotten"));
        }
        let newest = sent.events.last_key_value().map_or(0, |(seq, _)| *seq);
        let stored: u64 = job["cursor"].as_str().unwrap().parse().unwrap();
        if stored < newest {
            lost.push(format!("job {key}: event {newest} was seen, {stored} are stored"));
            continue;
        }
        let mut events = BTreeMap::new();
        if newest > 0 {
            let collect = |seq, seen| {
                events.insert(seq, seen);
                seq < newest
            };
            server.watch(id, collect).await;
        }
        for (seq, seen) in &sent.events {
            if events.get(seq) != Some(seen) {
                lost.push(format!(
                    "job {key}: event {seq} was {seen:?} and is {:?}",
                    events.get(seq)
                ));
            }
        }
    }
    for id in &datasets {
        let (status, items) = server.get(&format!("/datasets/{id}/items")).await;
        let items = items["data"].as_array().cloned().unwrap_or_default();
        if status != 200 || items.len() != 2 {
            lost.push(format!("dataset {id}: {status}, {} items", items.len()));
            continue;
        }
        for item in items {
            let file = data.join(format!("datasets/{id}/files/{:05}.png", item["n"].as_u64().unwrap()));
            let found = hex::encode(Sha256::digest(std::fs::read(&file).unwrap_or_default()));
            if item["sha256"] != found {
                lost.push(format!("dataset {id}: {} has the SHA-256 {found}", file.display()));
            }
        }
    }
    for id in &deleted {
        let (status, _) = server.get(&format!("/datasets/{id}")).await;
        if status != 404 {
            lost.push(format!("dataset {id} was deleted and is there: {status}"));
        }
    }
    lost
}

fn is_final(job: &Value) -> bool {
    ["succeeded", "failed", "cancelled"]
        .iter()
        .any(|status| job["status"] == *status)
}

/// Sends again what was never answered; then each key has its job.
async fn send_again(server: &Server, ledger: &Shared) {
    let unanswered: Vec<(String, Value)> = {
        let ledger = ledger.lock().unwrap();
        let open = ledger.jobs.iter().filter(|(_, sent)| sent.id.is_none());
        open.map(|(key, sent)| (key.clone(), sent.body.clone())).collect()
    };
    for (key, body) in unanswered {
        post(server, ledger, &key, body).await.unwrap();
    }
}

/// What the events of a job that is over say: it changed only as the state machine knows, was published at most once, and
/// went on from every checkpoint that was acknowledged. How many checkpoints those were.
async fn assert_life(server: &Server, key: &str, job: &Value) -> u64 {
    let id = job["id"].as_str().unwrap();
    let mut events = BTreeMap::new();
    let collect = |seq, seen| {
        events.insert(seq, seen);
        true
    };
    server.watch(id, collect).await;
    let last: u64 = job["cursor"].as_str().unwrap().parse().unwrap();
    let seqs: Vec<u64> = events.keys().copied().collect();
    assert_eq!(seqs, (1..=last).collect::<Vec<_>>(), "{key}: events with a gap");
    let (mut at, mut attempt, mut published, mut checkpoints) = (None, 0, 0, Vec::new());
    for seen in events.values() {
        match seen.kind.as_str() {
            "status" => {
                let to = JobStatus::parse(seen.data["to"].as_str().unwrap()).unwrap();
                if let Some(from) = seen.data["from"].as_str().and_then(JobStatus::parse) {
                    assert_eq!(at, Some(from), "{key}: a change from a state that it was not in");
                    let known = Change::ALL.iter().any(|change| from.next(*change) == Ok(to));
                    assert!(known, "{key}: {from} -> {to} is no transition");
                }
                at = Some(to);
                attempt = seen.data["attempt"].as_u64().unwrap();
                published += u64::from(to == JobStatus::Succeeded);
            }
            "checkpoint" => checkpoints.push((seen.data["step"].as_u64().unwrap(), attempt)),
            _ => {}
        }
    }
    assert_eq!(published, u64::from(job["status"] == "succeeded"), "{key}");
    let url = format!("{}/jobs/{id}/metrics?format=csv&keys=loss", server.url);
    let csv = server.http.get(url).send().await.unwrap().text().await.unwrap();
    let rows: Vec<(u64, u64)> = csv
        .lines()
        .skip(1)
        .map(|line| {
            let mut cells = line.split(',').map(|cell| cell.parse().unwrap_or(0));
            (cells.next().unwrap(), cells.next().unwrap())
        })
        .collect();
    if job["status"] == "succeeded" {
        let steps: Vec<u64> = rows.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "{key}");
    }
    for (step, by) in &checkpoints {
        for (row, of) in rows.iter().filter(|(row, _)| row <= step) {
            assert!(
                of <= by,
                "{key}: step {row} was trained again by attempt {of}, although attempt {by} had saved step {step}"
            );
        }
    }
    checkpoints.len() as u64
}

/// What was done to one disk or several, of which nothing was lost.
#[derive(Debug, Default)]
struct Figures {
    cuts: u64,
    while_starting: u64,
    jobs: u64,
    attempts: u64,
    checkpoints: u64,
    uploads: u64,
    acknowledged: u64,
    events: u64,
}

/// One disk and the machines that live and die on it: so many cuts, one life in which everything comes to its end, and one more cut.
async fn live(draws: &mut Draws, n_cuts: u64, figures: &mut Figures) {
    let (mut disk, ledger) = (Disk::blank(), Shared::default());
    for life in 1..=n_cuts {
        let mut machine = disk.serve(None);
        figures.cuts += 1;
        // Also before the server is up.
        if draws.within(0..5) == 0 {
            figures.while_starting += 1;
            tokio::time::sleep(Duration::from_millis(draws.within(0..300))).await;
            machine.cut(&mut disk);
            continue;
        }
        let server = whole(&disk, &mut machine, &ledger).await;
        let user = User::new(server, ledger.clone(), draws.split(), life);
        let working = tokio::spawn(user.work());
        tokio::time::sleep(Duration::from_millis(draws.within(50..2500))).await;
        assert!(!working.is_finished(), "the server does not answer: {}", disk.said());
        machine.cut(&mut disk);
        // It may still read what was acknowledged before.
        working.await.unwrap();
    }
    let mut machine = disk.serve(None);
    let server = whole(&disk, &mut machine, &ledger).await;
    let jobs = ledger.lock().unwrap().jobs.clone();
    for (key, sent) in &jobs {
        let id = sent.id.as_ref().unwrap();
        let start = Instant::now();
        let job = loop {
            let (_, job) = server.get(&format!("/jobs/{id}")).await;
            if is_final(&job) {
                break job;
            }
            assert!(start.elapsed() < PATIENCE, "{key} is stuck: {job:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(
            job["status"] == "succeeded" || job["status"] == "cancelled" && sent.cancel.is_some(),
            "{key}: {job:#}"
        );
        figures.checkpoints += assert_life(&server, key, &job).await;
        figures.attempts += job["attempt"].as_u64().unwrap();
        view(server.clone(), ledger.clone(), key.clone(), id.clone()).await;
    }
    let (_, all) = server.get("/jobs?limit=100").await;
    let n_stored = all["data"].as_array().unwrap().len();
    assert_eq!((n_stored, &all["has_more"]), (jobs.len(), &json!(false)), "a job twice");
    figures.cuts += 1;
    machine.cut(&mut disk);
    let mut machine = disk.serve(None);
    whole(&disk, &mut machine, &ledger).await;
    let ledger = ledger.lock().unwrap();
    figures.jobs += jobs.len() as u64;
    figures.uploads += (ledger.datasets.len() + ledger.deleted.len()) as u64;
    figures.acknowledged += ledger.n_acknowledged;
    figures.events += ledger.jobs.values().map(|sent| sent.events.len() as u64).sum::<u64>();
}

/// Waits until the server is up after a cut, makes sure that nothing is lost, and sends again what was never answered.
async fn whole(disk: &Disk, machine: &mut Machine, ledger: &Shared) -> Server {
    let server = Server::of(machine).unwrap_or_else(|| panic!("no server after a cut: {}", disk.said()));
    let gone = lost(&server, ledger, disk, machine).await;
    assert!(gone.is_empty(), "{gone:#?}");
    send_again(&server, ledger).await;
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_power_cut_at_any_moment() {
    let (mut draws, mut figures) = (Draws::new(), Figures::default());
    let n_cuts = times("LORAD_TEST_CUTS", 10) as u64;
    while figures.cuts < n_cuts {
        let left = n_cuts - figures.cuts;
        live(&mut draws, left.clamp(2, CUTS_PER_DISK) - 1, &mut figures).await;
    }
    let Figures {
        cuts,
        while_starting,
        jobs,
        attempts,
        checkpoints,
        uploads,
        acknowledged,
        events,
    } = figures;
    println!(
        "power cuts: {cuts} ({while_starting} while the server started), {jobs} jobs in {attempts} attempts with {checkpoints} \
         checkpoints, {uploads} uploads; {acknowledged} acknowledged requests and {events} seen events: 0 lost, 0 published twice, \
         fsck finds nothing"
    );
}

/// The method itself.
#[test]
fn a_cut_keeps_what_was_flushed_and_nothing_else() {
    // `sync FILE` is fsync of that file.
    let script = "cd \"$MOUNT\" && mkdir kept && echo flushed > kept/file && sync kept/file && sync kept && sync . &&
        echo more >> kept/file && mkdir lost && echo written > lost/file && echo ready && exec sleep 1000";
    let read = |machine: &Machine, disk: &Disk, name: &str| {
        std::fs::read_to_string(machine.inside(&disk.mount()).join(name)).ok()
    };
    let is_kept_and_lost = || {
        let mut disk = Disk::blank();
        let mut machine = disk.boot(script, &[]);
        assert_eq!(machine.line(), "ready", "{}", disk.said());
        assert_eq!(read(&machine, &disk, "kept/file").unwrap(), "flushed\nmore\n");
        assert_eq!(read(&machine, &disk, "lost/file").unwrap(), "written\n");
        machine.cut(&mut disk);
        let mut machine = disk.boot("echo ready && exec sleep 1000", &[]);
        assert_eq!(machine.line(), "ready", "{}", disk.said());
        let kept = read(&machine, &disk, "kept/file").unwrap();
        assert!(kept.starts_with("flushed\n"), "{kept:?}");
        kept == "flushed\n" && read(&machine, &disk, "lost/file").is_none()
    };
    assert!(
        (0..TRIES).any(|_| is_kept_and_lost()),
        "what was never flushed is on the disk"
    );
}

/// What a machine without the flushes of these files has lost after a cut, when it had acknowledged an upload, published one job's
/// results and saved a checkpoint of another one.
async fn lost_without(unsynced: &str, mut disk: Disk) -> Vec<String> {
    let ledger = Shared::default();
    let mut machine = disk.serve(Some(unsynced));
    let server = Server::of(&mut machine).unwrap_or_else(|| panic!("{}", disk.said()));
    let (_, dataset) = server.upload("upload").await.unwrap();
    let dataset = dataset["id"].as_str().unwrap().to_owned();
    ledger.lock().unwrap().datasets.insert(dataset);
    for (key, steps, awaited) in [("short", 1, "succeeded"), ("long", 10_000, "checkpoint")] {
        let body = a_job(&server, key, steps).await.unwrap();
        let id = post(&server, &ledger, key, body).await.unwrap();
        let mut has_come = false;
        let until = |seq, seen: Seen| {
            has_come = seen.kind == awaited || seen.data["to"] == awaited;
            ledger.lock().unwrap().sent(key).events.insert(seq, seen);
            !has_come
        };
        server.watch(&id, until).await;
        assert!(has_come, "{key}: {awaited} never came: {}", disk.said());
    }
    machine.cut(&mut disk);
    let mut machine = disk.serve(None);
    match Server::of(&mut machine) {
        Some(server) => lost(&server, &ledger, &disk, &machine).await,
        None => vec![format!("every job: the server does not start: {}", disk.said())],
    }
}

/// Takes from the program, one after the other, the flushes of everything, of its database, of uploads, of checkpoints and of
/// results: each time the checks of this file must see that just that is gone. With every flush in place, nothing is.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_leaves_out_one_kind_of_flush_is_seen_to_lose_it() {
    let mut installed = Disk::blank();
    let mut machine = installed.serve(None);
    assert!(Server::of(&mut machine).is_some(), "{}", installed.said());
    machine.cut(&mut installed);
    let installed = Arc::new(installed);
    // Which paths are not flushed, and a word of what is then said to be lost.
    let cases = [
        ("/no such path/", None),
        ("", Some("job")),
        ("/lorad.sqlite3", Some("job")),
        ("/data/tmp/", Some("dataset")),
        ("/checkpoints/", Some("checkpoint.damaged")),
        ("/data/artifacts/", Some("file.")),
    ];
    let runs = cases.map(|(unsynced, expected)| {
        let installed = installed.clone();
        tokio::spawn(async move {
            let mut gone = Vec::new();
            for _ in 0..TRIES {
                gone = lost_without(unsynced, installed.copy()).await;
                match expected {
                    None => {
                        assert!(gone.is_empty(), "lost although everything was flushed: {gone:#?}");
                        break;
                    }
                    Some(word) if gone.iter().any(|line| line.contains(word)) => break,
                    Some(_) => {}
                }
            }
            assert!(
                expected.is_none() || !gone.is_empty(),
                "the flushes of {unsynced:?} were left out {TRIES} times, and nothing was seen to be lost"
            );
            format!("{unsynced:?}: {}", gone.len())
        })
    });
    let mut figures = Vec::new();
    for run in runs {
        figures.push(run.await.unwrap());
    }
    println!(
        "flushes left out, and how much was seen to be lost: {}",
        figures.join(", ")
    );
}
