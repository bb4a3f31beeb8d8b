//! The state machine against a model: sequences of everything that users, workers and the scheduler can do to a job, in
//! any order, drawn from a seed. After each act the store must be in a state that the rules allow.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use lorad_proto::{
    event::{Envelope, Phase, Results, StopReason, WorkerEvent},
    problem::Problem,
};
use serde_json::Map;

use super::{
    tests::{Fixture, LIMITS, checkpoint, done, fixture, hello, step},
    *,
};
use crate::domain::{Action, CancelMode, Change, EventKind, Exit, Job, NewJob};

const ACTS: u64 = 24;

/// `LORAD_TEST_SEQUENCES`, or as many as a quick run plays.
fn sequences() -> u64 {
    let given = std::env::var("LORAD_TEST_SEQUENCES").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(1000)
}

/// splitmix64
struct Draws(u64);

impl Draws {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What a worker may say next.
fn word(draws: &mut Draws, trained: &mut u64) -> WorkerEvent {
    let stopped = |reason, results| WorkerEvent::Stopped {
        step: 1,
        reason,
        results,
    };
    match draws.below(12) {
        0 => WorkerEvent::Phase {
            phase: Phase::Exporting,
            done: 0,
            total: 1,
        },
        1 => done(),
        2 => WorkerEvent::Failed {
            problem: Problem::new("x", "x", "x"),
        },
        3 => stopped(StopReason::Paused, None),
        4 => stopped(StopReason::Drained, None),
        5 => stopped(StopReason::Cancelled, None),
        6 => stopped(
            StopReason::Cancelled,
            Some(Results {
                files: Vec::new(),
                summary: Map::new(),
            }),
        ),
        7 => checkpoint(*trained),
        8 => hello(Some(*trained)),
        _ => {
            *trained += 1;
            step(*trained)
        }
    }
}

/// One sequence. What was refused is no fault: the point is what the store is like afterwards.
async fn play(f: &Fixture, new: &NewJob, draws: &mut Draws, n_refused: &mut u64) -> Job {
    let store = &f.store;
    let id = store.insert_job(new, None).await.unwrap().id;
    let device = id.to_string();
    let mut before = store.job(id).await.unwrap();
    let (mut trained, mut seqs) = (0, std::collections::HashMap::<u32, u64>::new());
    for act in 0..ACTS {
        let mode = CancelMode::ALL[usize::try_from(draws.below(3)).unwrap()];
        let attempt = before.attempt;
        let outcome = match draws.below(20) {
            0..=3 => {
                let new = NewAttempt {
                    device: &device,
                    token_sha256: &"a".repeat(64),
                    jobs_dir: f.dir.path(),
                    lease_ms: 1000,
                    memory_bytes: None,
                };
                store.claim(&new).await.map(drop)
            }
            4..=9 => {
                // Now and then from an attempt that is long gone: a zombie.
                let speaker = if draws.below(6) == 0 {
                    attempt.saturating_sub(1)
                } else {
                    attempt
                };
                let seq = seqs.entry(speaker).or_insert(0);
                let event = word(draws, &mut trained);
                let envelope = Envelope {
                    seq: *seq + 1,
                    t_ms: 1,
                    event,
                };
                let batch = WorkerBatch {
                    job: id,
                    attempt: speaker,
                    token_sha256: &"a".repeat(64),
                    events: &[envelope],
                    published: &std::collections::HashSet::new(),
                    lease_ms: 1000,
                };
                let applied = store.apply(&batch).await;
                if let Ok(applied) = &applied {
                    assert_eq!(speaker, attempt, "a zombie wrote");
                    *seq = applied.acked_seq;
                }
                applied.map(drop)
            }
            10..=13 => {
                let exits = [Exit::Code(0), Exit::Signal(9), Exit::Code(75), Exit::NeverStarted];
                let exit = &exits[usize::try_from(draws.below(4)).unwrap()];
                match store.live_attempts().await.unwrap().iter().find(|a| a.job_id == id) {
                    Some(live) => store.end_attempt(id, live.attempt, exit, "", LIMITS).await.map(drop),
                    None => Ok(()),
                }
            }
            14 => store.complete(id, attempt, &[], &Map::new()).await.map(drop),
            15 => store
                .fail_attempt(id, attempt, &Problem::new("y", "y", "y"))
                .await
                .map(drop),
            16 => store.request_pause(id).await.map(drop),
            17 => store.request_resume(id).await.map(drop),
            18 => store.request_now(id, Action::Checkpoint).await.map(drop),
            _ if draws.below(4) == 0 => store.request_cancel(id, mode).await.map(drop),
            _ => Ok(()),
        };
        match outcome {
            Ok(()) => {}
            Err(
                StoreError::NotAllowed { .. }
                | StoreError::Fenced { .. }
                | StoreError::NotFound { .. }
                | StoreError::Illegal { .. },
            ) => *n_refused += 1,
            Err(error) => panic!("act {act}: {error:?}"),
        }
        let after = store.job(id).await.unwrap();
        assert!(after.attempt >= before.attempt, "the fence fell");
        assert!(
            !before.status.is_final() || after.status == before.status,
            "{} became {}",
            before.status,
            after.status
        );
        assert_eq!(after.status.is_final(), after.finished_at_ms.is_some());
        assert!(after.failed_attempts < LIMITS.max_failed_attempts || after.status.is_final());
        let live = store.live_attempts().await.unwrap();
        assert!(
            live.iter().filter(|attempt| attempt.job_id == id).count() <= 1,
            "two attempts at once"
        );
        before = after;
    }
    before
}

#[tokio::test]
async fn a_thousand_sequences_of_acts_leave_only_states_that_the_rules_allow() {
    let f = fixture().await;
    let seed = std::env::var("LORAD_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| crate::domain::now_ms().unsigned_abs());
    println!("LORAD_TEST_SEED={seed}");
    let mut draws = Draws(seed);
    let (mut n_refused, mut n_changes, mut n_final) = (0, 0, 0);
    let n_sequences = sequences();
    for _ in 0..n_sequences {
        // No other sequence's job may be claimed in its place.
        f.clear_queue().await;
        let job = play(&f, &f.new_job("m", 0), &mut draws, &mut n_refused).await;
        let events = f.store.events_after(job.id, 0, 1000).await.unwrap();
        let numbers: Vec<u64> = events.iter().map(|event| event.seq).collect();
        assert_eq!(numbers, (1..=job.last_seq).collect::<Vec<_>>(), "events with a gap");
        let mut at = None;
        for event in events.iter().filter(|event| event.kind == EventKind::Status) {
            let status = |key: &str| event.data[key].as_str().and_then(JobStatus::parse);
            let to = status("to").unwrap();
            if let Some(from) = status("from") {
                assert_eq!(at, Some(from), "a change from a state that it was not in");
                let known = Change::ALL.iter().any(|change| from.next(*change) == Ok(to));
                assert!(known, "{from} -> {to}");
                n_changes += 1;
            }
            at = Some(to);
        }
        assert_eq!(at, Some(job.status), "the last event is not the state");
        n_final += u64::from(job.status.is_final());
    }
    println!(
        "state machine: {n_sequences} sequences of {ACTS} acts, {n_changes} legal changes, 0 illegal, {n_refused} acts \
         refused, {n_final} jobs final"
    );
    assert!(
        n_changes > 2 * n_sequences && n_final > n_sequences / 10,
        "the acts are too tame"
    );
}
