//! One child process per attempt on this machine.
//!
//! Each leads its own process group (so that ctrl-c on the server's terminal does not reach it, and so that killing it
//! takes everything it started along), gets an allow-listed environment (no secrets of the server) and writes stdout and
//! stderr to `worker.log`: a pipe would kill it together with the server.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use rustix::process::Signal;
use tokio::{process::Command, sync::Notify};

use super::{AttemptKey, Executor, Launch, Observed, Started, Stop, process};
use crate::domain::Exit;

/// Variables that a worker inherits: what finds programs, libraries and devices, and nothing else.
const INHERITED: &[&str] = &[
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
];

/// File that a worker leaves with its exit code, for a server that is not its parent.
pub const EXIT_FILE: &str = "exit.json";

/// Log of a worker's stdout and stderr.
pub const LOG_FILE: &str = "worker.log";

#[derive(Debug)]
struct Slot {
    process: Started,
    exit: Option<Exit>,
}

type Slots = Arc<Mutex<HashMap<AttemptKey, Slot>>>;

/// Child processes of this machine.
#[derive(Debug, Clone)]
pub struct LocalExecutor {
    program: PathBuf,
    devices: Vec<String>,
    slots: Slots,
    ended: Arc<Notify>,
}

impl LocalExecutor {
    /// Runs `program worker --attempt-dir D` on `devices`; `ended` is notified when a process ends.
    pub fn new(program: PathBuf, devices: Vec<String>, ended: Arc<Notify>) -> Self {
        Self {
            program,
            devices,
            slots: Slots::default(),
            ended,
        }
    }

    fn with_slots<T>(&self, act: impl FnOnce(&mut HashMap<AttemptKey, Slot>) -> T) -> T {
        act(&mut self.slots.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records how an attempt ended as soon as `exit` knows.
    fn watch(&self, key: AttemptKey, exit: impl Future<Output = Exit> + Send + 'static) {
        let this = self.clone();
        tokio::spawn(async move {
            let exit = exit.await;
            this.with_slots(|slots| {
                if let Some(slot) = slots.get_mut(&key) {
                    slot.exit = Some(exit);
                }
            });
            this.ended.notify_one();
        });
    }
}

#[async_trait]
impl Executor for LocalExecutor {
    fn caps(&self) -> &[String] {
        &self.devices
    }

    async fn submit(&self, launch: &Launch) -> std::io::Result<Started> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(launch.dir.join(LOG_FILE))?;
        let mut command = Command::new(&self.program);
        command
            .arg("worker")
            .arg("--attempt-dir")
            .arg(&launch.dir)
            .current_dir(&launch.dir)
            .env_clear()
            .envs(
                INHERITED
                    .iter()
                    .filter_map(|name| Some((name, std::env::var_os(name)?))),
            )
            .env(crate::agent::ENV_TOKEN, &launch.token)
            .env(crate::agent::ENV_SOCKET, &launch.socket)
            .env(crate::agent::ENV_HEARTBEAT_MS, launch.heartbeat_ms.to_string())
            .env(crate::agent::ENV_LEASE_MS, launch.lease_ms.to_string())
            .env(crate::agent::ENV_NICE, launch.nice.to_string())
            .env(crate::agent::ENV_MEMORY_BYTES, launch.memory_bytes.to_string())
            .env(super::KEEP_FREED_MEMORY.0, super::KEEP_FREED_MEMORY.1)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(false);
        if launch.memory_bytes > 0 {
            // The limit counts what may be written to: mimalloc's reserve of a gigabyte must not be, before it is used.
            command.env("MIMALLOC_ARENA_EAGER_COMMIT", "0");
        }
        if launch.threads > 0 {
            command.env("RAYON_NUM_THREADS", launch.threads.to_string());
        }
        let kills = process::out_of_memory_kills();
        let mut child = command.spawn()?;
        let pid = child
            .id()
            .ok_or_else(|| std::io::Error::other("the worker ended at once"))?;
        let process = Started {
            pid,
            pid_start: process::start_time(pid),
        };
        self.with_slots(|slots| slots.insert(launch.key, Slot { process, exit: None }));
        self.watch(launch.key, async move {
            match child.wait().await {
                Ok(status) => match exit_of(status) {
                    // Nobody else may have been killed meanwhile, so this is a guess, and a good one.
                    Exit::Signal(9) if process::out_of_memory_kills() > kills => Exit::OutOfMemory(9),
                    exit => exit,
                },
                Err(_) => Exit::Unknown,
            }
        });
        Ok(process)
    }

    fn adopt(&self, key: AttemptKey, process: Started, dir: PathBuf) -> bool {
        if !process::is_alive(process.pid, process.pid_start) {
            return false;
        }
        self.with_slots(|slots| slots.insert(key, Slot { process, exit: None }));
        self.watch(key, async move {
            process::wait_gone(process.pid, process.pid_start).await;
            exit_left_in(&dir)
        });
        true
    }

    fn stop(&self, key: AttemptKey, how: Stop) {
        let alive = self.with_slots(|slots| {
            slots
                .get(&key)
                .filter(|slot| slot.exit.is_none())
                .map(|slot| slot.process)
        });
        if let Some(process) = alive {
            let signal = match how {
                Stop::Terminate => Signal::TERM,
                Stop::Kill => Signal::KILL,
            };
            process::signal_group(process.pid, signal);
        }
    }

    fn observe(&self, key: AttemptKey) -> Observed {
        self.with_slots(|slots| match slots.get(&key) {
            None => Observed::Unknown,
            Some(Slot { exit: None, .. }) => Observed::Running,
            Some(Slot { exit: Some(exit), .. }) => Observed::Exited(exit.clone()),
        })
    }

    fn forget(&self, key: AttemptKey) {
        self.with_slots(|slots| slots.remove(&key));
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}

/// How an attempt ended that nobody waited for, by the note it left.
pub fn exit_left_in(attempt_dir: &Path) -> Exit {
    let code = std::fs::read(attempt_dir.join(EXIT_FILE))
        .ok()
        .and_then(|note| serde_json::from_slice::<serde_json::Value>(&note).ok())
        .and_then(|note| i32::try_from(note.get("code")?.as_i64()?).ok());
    code.map_or(Exit::Unknown, Exit::Code)
}

/// The last lines of a worker's log, at most 2 KiB.
pub fn log_tail(attempt_dir: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(attempt_dir.join(LOG_FILE))?;
        let start = file.metadata()?.len().saturating_sub(2048);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(2048).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // A cut first line would read like nonsense.
        Ok(match text.split_once('\n') {
            Some((_, rest)) if start > 0 => rest.to_owned(),
            _ => text,
        })
    };
    read().unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::domain::JobId;

    struct Fake {
        executor: LocalExecutor,
        launch: Launch,
        ended: Arc<Notify>,
        _dir: tempfile::TempDir,
    }

    /// An executor whose worker is this shell script.
    fn worker(script: &str) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("worker.sh");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let ended = Arc::new(Notify::new());
        let launch = Launch {
            key: (JobId::new(), 1),
            dir: dir.path().to_owned(),
            token: "secret".to_owned(),
            socket: dir.path().join("agent.sock"),
            threads: 2,
            memory_bytes: 0,
            nice: 0,
            heartbeat_ms: 100,
            lease_ms: 1000,
        };
        Fake {
            executor: LocalExecutor::new(program, vec!["cpu".to_owned()], ended.clone()),
            launch,
            ended,
            _dir: dir,
        }
    }

    async fn exit(fake: &Fake) -> Exit {
        loop {
            if let Observed::Exited(exit) = fake.executor.observe(fake.launch.key) {
                return exit;
            }
            tokio::time::timeout(std::time::Duration::from_secs(10), fake.ended.notified())
                .await
                .unwrap();
        }
    }

    #[tokio::test]
    async fn an_exit_code_and_the_last_words_are_kept() {
        let fake = worker("echo out of luck >&2; exit 7");
        fake.executor.submit(&fake.launch).await.unwrap();
        assert_eq!(exit(&fake).await, Exit::Code(7));
        assert_eq!(log_tail(&fake.launch.dir), "out of luck\n");
    }

    #[tokio::test]
    async fn killing_reaches_what_the_worker_started_too() {
        let fake = worker("sleep 1000 & echo $! > grandchild; wait");
        fake.executor.submit(&fake.launch).await.unwrap();
        let note = fake.launch.dir.join("grandchild");
        let grandchild: u32 = loop {
            if let Ok(pid) = std::fs::read_to_string(&note).unwrap_or_default().trim().parse() {
                break pid;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        };
        assert_eq!(fake.executor.observe(fake.launch.key), Observed::Running);
        fake.executor.stop(fake.launch.key, Stop::Kill);
        assert_eq!(exit(&fake).await, Exit::Signal(9));
        for _ in 0..200 {
            if process::start_time(grandchild).is_none() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("the grandchild lives");
    }

    #[tokio::test]
    async fn the_environment_is_the_allow_list() {
        let fake = worker("env > environment");
        fake.executor.submit(&fake.launch).await.unwrap();
        assert_eq!(exit(&fake).await, Exit::Code(0));
        let text = std::fs::read_to_string(fake.launch.dir.join("environment")).unwrap();
        // PWD, SHLVL and _ are the shell's own.
        for name in text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, _)| name)
        {
            let known = INHERITED.contains(&name)
                || name.starts_with("LORAD_")
                || [
                    "RAYON_NUM_THREADS",
                    super::super::KEEP_FREED_MEMORY.0,
                    "PWD",
                    "SHLVL",
                    "_",
                    "OLDPWD",
                ]
                .contains(&name);
            assert!(known, "{name} leaked");
        }
        assert!(text.contains("LORAD_ATTEMPT_TOKEN=secret"));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error_and_no_process() {
        let mut fake = worker("");
        fake.executor.program = "/nonexistent/lorad".into();
        assert!(fake.executor.submit(&fake.launch).await.is_err());
        assert_eq!(fake.executor.observe(fake.launch.key), Observed::Unknown);
    }

    #[tokio::test]
    async fn an_adopted_process_is_seen_dead_with_the_code_it_left() {
        let fake = worker("sleep 0.3; echo '{\"code\": 75}' > exit.json; exit 75");
        let process = fake.executor.submit(&fake.launch).await.unwrap();
        // A second executor stands for a restarted server: to it, the process is no child.
        let second = LocalExecutor::new("/nonexistent".into(), vec![], fake.ended.clone());
        let wrong = Started {
            pid_start: process.pid_start.map(|ticks| ticks + 1),
            ..process
        };
        assert!(
            !second.adopt(fake.launch.key, wrong, fake.launch.dir.clone()),
            "another process under a reused pid"
        );
        assert!(second.adopt(fake.launch.key, process, fake.launch.dir.clone()));
        assert_eq!(second.observe(fake.launch.key), Observed::Running);
        let adopted = Fake {
            executor: second,
            ..fake
        };
        assert_eq!(exit(&adopted).await, Exit::Code(75));
    }
}
