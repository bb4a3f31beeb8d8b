//! The spool: events on disk first, then to the server.
//!
//! `events.jsonl` holds one [`Envelope`] a line. It is flushed to disk with each checkpoint and with the final event, so
//! that no checkpoint is known to the server before it is known here.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use lorad_faults::{Point, around, write_all};
use lorad_proto::{
    command::Command,
    event::{Envelope, WorkerEvent},
};
use tokio::sync::Notify;

use crate::domain::now_ms;

/// File name of the spool.
pub(crate) const SPOOL_FILE: &str = "events.jsonl";

#[derive(Debug)]
struct State {
    file: File,
    /// Length of the file up to its last whole line.
    whole_bytes: u64,
    /// Whether a failed write left a part of a line after that.
    is_torn: bool,
    /// Newest event that is in the file.
    spooled_seq: u64,
    next_seq: u64,
    /// Not acknowledged yet.
    pending: VecDeque<Envelope>,
    command: Command,
    /// Set when a newer attempt owns the job: nothing is written any more.
    fenced: bool,
    final_seq: Option<u64>,
}

/// Shared by the training thread, which appends, and the poster, which takes.
#[derive(Debug)]
pub(super) struct Spool {
    state: Mutex<State>,
    appended: Notify,
}

impl Spool {
    pub(super) fn create(attempt_dir: &Path) -> std::io::Result<Self> {
        // A second worker in one attempt directory is a bug of the server: better to end than to mix two spools.
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(attempt_dir.join(SPOOL_FILE))?;
        Ok(Self {
            state: Mutex::new(State {
                file,
                whole_bytes: 0,
                is_torn: false,
                spooled_seq: 0,
                next_seq: 1,
                pending: VecDeque::new(),
                command: Command::None,
                fenced: false,
                final_seq: None,
            }),
            appended: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers an event, writes it to disk and leaves it for the poster.
    pub(super) fn append(&self, event: WorkerEvent) {
        let mut state = self.lock();
        if state.fenced || state.final_seq.is_some() {
            return;
        }
        let envelope = Envelope {
            seq: state.next_seq,
            t_ms: now_ms(),
            event,
        };
        state.next_seq += 1;
        if envelope.event.is_final() {
            state.final_seq = Some(envelope.seq);
        }
        state.pending.push_back(envelope);
        if let Err(error) = state.spool() {
            // A full disk must not end the training: the server still hears the event by post.
            tracing::error!(%error, seq = state.next_seq - 1, "an event was not spooled");
        }
        drop(state);
        self.appended.notify_one();
    }

    /// Waits until an event is appended.
    pub(super) async fn appended(&self) {
        self.appended.notified().await;
    }

    /// The oldest events that are not acknowledged, at most `limit`.
    pub(super) fn batch(&self, limit: usize) -> Vec<Envelope> {
        self.lock().pending.iter().take(limit).cloned().collect()
    }

    /// Drops what is acknowledged and takes the server's command. Whether the final event is acknowledged.
    pub(super) fn acknowledge(&self, acked_seq: u64, command: Command) -> bool {
        let mut state = self.lock();
        while state.pending.front().is_some_and(|event| event.seq <= acked_seq) {
            state.pending.pop_front();
        }
        state.command = command;
        state.final_seq.is_some_and(|seq| seq <= acked_seq)
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.lock().pending.is_empty()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.lock().final_seq.is_some()
    }

    pub(super) fn command(&self) -> Command {
        self.lock().command
    }

    /// Overrides the server's command when the server is out of reach.
    pub(super) fn drain(&self) {
        self.lock().command = Command::Drain;
    }

    /// A newer attempt owns the job: stop, write nothing.
    pub(super) fn fence(&self) {
        let mut state = self.lock();
        state.fenced = true;
        state.pending.clear();
        state.command = Command::Cancel { save: false };
    }
}

impl State {
    /// Writes the pending events that are not in the file yet: the newest, and those that an earlier try could not write.
    fn spool(&mut self) -> std::io::Result<()> {
        let first = self
            .pending
            .partition_point(|envelope| envelope.seq <= self.spooled_seq);
        for envelope in self.pending.range(first..) {
            let mut line = serde_json::to_vec(envelope)?;
            line.push(b'\n');
            if std::mem::replace(&mut self.is_torn, true) {
                // Half a line would hide every line after it.
                self.file.set_len(self.whole_bytes)?;
            }
            write_all(Point::SpoolEvent, &mut self.file, &line)?;
            self.is_torn = false;
            self.whole_bytes += line.len() as u64;
            self.spooled_seq = envelope.seq;
            if envelope.event.is_final() || matches!(envelope.event, WorkerEvent::Checkpoint { .. }) {
                around(Point::SyncSpool, || self.file.sync_data())?;
            }
        }
        Ok(())
    }
}

/// The events of a spool with a number above `after`, for the server when the worker is dead. A torn last line is not an
/// event.
pub(crate) fn read_spool(attempt_dir: &Path, after: u64) -> std::io::Result<Vec<Envelope>> {
    let bytes = match std::fs::read(attempt_dir.join(SPOOL_FILE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    Ok(bytes
        .split(|b| *b == b'\n')
        .map_while(|line| serde_json::from_slice::<Envelope>(line).ok())
        .filter(|envelope| envelope.seq > after)
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use lorad_proto::event::Level;

    use super::*;

    fn log(message: &str) -> WorkerEvent {
        WorkerEvent::Log {
            level: Level::Info,
            message: message.to_owned(),
        }
    }

    fn failed() -> WorkerEvent {
        WorkerEvent::Failed {
            problem: lorad_proto::problem::Problem::new("x", "x", "x"),
        }
    }

    #[test]
    fn events_are_on_disk_in_order_even_when_nobody_took_them() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::create(dir.path()).unwrap();
        for i in 0..5 {
            spool.append(log(&format!("line {i}\nwith a break")));
        }
        spool.append(failed());
        spool.append(log("after the end"));
        let events = read_spool(dir.path(), 2).unwrap();
        assert_eq!(events.iter().map(|event| event.seq).collect::<Vec<_>>(), [3, 4, 5, 6]);
        assert_eq!(events, spool.batch(100)[2..]);
        assert!(Spool::create(dir.path()).is_err(), "two workers in one directory");
    }

    #[test]
    fn a_torn_last_line_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::create(dir.path()).unwrap();
        spool.append(log("whole"));
        let file = dir.path().join(SPOOL_FILE);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.extend(b"{\"seq\":2,\"t_ms\":5,\"ty");
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(read_spool(dir.path(), 0).unwrap().len(), 1);
    }

    #[test]
    fn only_what_is_acknowledged_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::create(dir.path()).unwrap();
        for _ in 0..3 {
            spool.append(log("x"));
        }
        assert!(!spool.acknowledge(2, Command::Pause));
        assert_eq!((spool.batch(10)[0].seq, spool.command()), (3, Command::Pause));
        spool.append(failed());
        assert!(spool.acknowledge(4, Command::None));
        spool.fence();
        assert_eq!(spool.command(), Command::Cancel { save: false });
    }
}
