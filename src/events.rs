//! From the store to viewers: what is new about a job, without a gap and without a double.
//!
//! Writers only say how far the store is ([`Events::stored`]); a [`Follower`] then reads the new events from SQLite. So a
//! slow viewer loses nothing, and no order of publication can differ from the stored order. Progress is transient and
//! only its newest value counts. Knows no HTTP. Callers: `http` follows, `app`, `scheduler` and `agent_api` publish.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::{
    domain::{JobEvent, JobId, Progress},
    store::{Store, StoreError},
};

/// Progress reaches viewers at most this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// How many events one read takes at most, and how many bytes of them (but one event at least): so much is held for a viewer
/// that takes nothing.
const PAGE: (u32, usize) = (500, 64 << 10);

#[derive(Debug)]
struct Topic {
    stored: watch::Sender<u64>,
    progress: watch::Sender<Option<Arc<Progress>>>,
    progress_at: Option<Instant>,
}

impl Topic {
    fn new() -> Self {
        Self {
            stored: watch::Sender::new(0),
            progress: watch::Sender::new(None),
            progress_at: None,
        }
    }
}

/// The switchboard. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Events {
    topics: Arc<Mutex<HashMap<JobId, Topic>>>,
}

impl Events {
    /// Says that the store holds events of `job` up to `seq`.
    pub fn stored(&self, job: JobId, seq: u64) {
        self.with(job, |topic| {
            topic.stored.send_if_modified(|newest| {
                let grew = seq > *newest;
                *newest = (*newest).max(seq);
                grew
            });
        });
    }

    /// Publishes progress; dropped when the last one is younger than half a second, unless the phase changed.
    pub fn progress(&self, job: JobId, progress: Progress) {
        self.with(job, |topic| {
            let same_phase = topic
                .progress
                .borrow()
                .as_ref()
                .is_some_and(|last| last.phase == progress.phase);
            if same_phase && topic.progress_at.is_some_and(|at| at.elapsed() < PROGRESS_EVERY) {
                return;
            }
            topic.progress_at = Some(Instant::now());
            topic.progress.send_replace(Some(Arc::new(progress)));
        });
    }

    /// The newest progress of a job's running attempt.
    pub fn newest_progress(&self, job: JobId) -> Option<Arc<Progress>> {
        self.lock().get(&job).and_then(|topic| topic.progress.borrow().clone())
    }

    /// Forgets progress; when an attempt has ended.
    pub fn end_progress(&self, job: JobId) {
        if let Some(topic) = self.lock().get_mut(&job) {
            topic.progress_at = None;
            topic.progress.send_replace(None);
        }
    }

    /// Follows a job from an event on; `after` 0: from its first event.
    pub fn follow(&self, store: &Store, job: JobId, after: u64) -> Follower {
        let (stored, mut progress) = self.with(job, |topic| (topic.stored.subscribe(), topic.progress.subscribe()));
        progress.mark_changed();
        Follower {
            store: store.clone(),
            job,
            cursor: after,
            page: Vec::new().into_iter(),
            read_again: true,
            stored,
            progress,
        }
    }

    /// Drops the topics that nobody follows, of jobs that say nothing any more.
    pub fn prune(&self, is_quiet: impl Fn(JobId) -> bool) {
        self.lock().retain(|job, topic| {
            topic.stored.receiver_count() > 0 || topic.progress.receiver_count() > 0 || !is_quiet(*job)
        });
    }

    /// How many jobs have a topic.
    pub fn topics(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Topic>> {
        // A panic while the lock was held cannot leave the map half changed.
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, job: JobId, act: impl FnOnce(&mut Topic) -> T) -> T {
        act(self.lock().entry(job).or_insert_with(Topic::new))
    }
}

/// Something new about a job.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// A stored event; its `seq` is a viewer's cursor.
    Event(JobEvent),
    /// Progress, or `None` when the attempt ended.
    Progress(Option<Arc<Progress>>),
}

/// A viewer's place in a job's events.
#[derive(Debug)]
pub struct Follower {
    store: Store,
    job: JobId,
    cursor: u64,
    page: std::vec::IntoIter<JobEvent>,
    read_again: bool,
    stored: watch::Receiver<u64>,
    progress: watch::Receiver<Option<Arc<Progress>>>,
}

impl Follower {
    /// Number of the newest event handed out.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// The next event, or progress, waiting for it if need be. Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn next(&mut self) -> Result<News, StoreError> {
        loop {
            if let Some(event) = self.page.next() {
                self.cursor = event.seq;
                return Ok(News::Event(event));
            }
            if self.read_again {
                // What is stored from here on makes the next `changed()` ready, so nothing falls between.
                self.stored.mark_unchanged();
                let page = self.store.events_page(self.job, self.cursor, PAGE.0, PAGE.1).await?;
                self.read_again = page.has_more;
                if !page.data.is_empty() {
                    self.page = page.data.into_iter();
                    continue;
                }
            }
            tokio::select! {
                biased;
                changed = self.stored.changed() => match changed {
                    Ok(()) => self.read_again = true,
                    // The topic was pruned, which happens only without receivers: unreachable while this one lives.
                    Err(_) => std::future::pending().await,
                },
                Ok(()) = self.progress.changed() => {
                    let progress = self.progress.borrow_and_update().clone();
                    return Ok(News::Progress(progress));
                }
            }
        }
    }
}
