//! A machine whose power can be cut: processes and a disk in namespaces of their own.
//!
//! The disk is an image file with ext4 in it, mounted by a loop device. Only what the file system has sent to its device is
//! in the image; what was written and not flushed is in the kernel's memory alone, and the mount options keep the kernel from
//! flushing anything by itself. So a copy of the image, made while every process of the machine is stopped, is what a disk
//! holds after a power cut. Not covered: a disk that loses what it has taken (its own cache), or that tears a sector.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::server::PATIENCE;

const DISK_MIB: u64 = 96;

/// Nothing reaches the disk by time (`commit`), nor because a file was renamed over another one (`auto_da_alloc`).
const MOUNT: &str = "mount -t ext4 -o loop,noatime,commit=600,noauto_da_alloc \"$IMAGE\" \"$MOUNT\" && echo mounted";

/// What the machine does when it is turned on.
const SERVE: &str = "
    if [ -f \"$LORAD_STORAGE__DATA_DIR/lorad.sqlite3\" ]; then \"$PROGRAM\" fsck --json > \"$FINDINGS\"; fi
    [ -z \"$SHIM\" ] || export LD_PRELOAD=\"$SHIM\"
    exec \"$PROGRAM\" serve --bind 127.0.0.1:0";

/// A library that makes flushing a lie for files whose path holds `LORAD_TEST_UNSYNCED`.
const SHIM: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_unsynced(int fd) {
    const char *part = getenv("LORAD_TEST_UNSYNCED");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (part == NULL || length < 0) return 0;
    path[length] = 0;
    return strstr(path, part) != NULL;
}

int fsync(int fd) { return is_unsynced(fd) ? 0 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return is_unsynced(fd) ? 0 : (int)syscall(SYS_fdatasync, fd); }
"#;

/// One disk: the image as it is now, and the folder where a machine mounts it.
pub struct Disk {
    dir: tempfile::TempDir,
    image: PathBuf,
    n_cuts: u32,
}

impl Disk {
    pub fn blank() -> Self {
        let disk = Self::in_a_folder();
        let file = std::fs::File::create(&disk.image).unwrap();
        file.set_len(DISK_MIB << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(&disk.image)
            .output()
            .expect("`mkfs.ext4` of e2fsprogs starts; as root, /usr/sbin must be in PATH");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        disk
    }

    fn in_a_folder() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let image = dir.path().join("0.img");
        let n_cuts = 0;
        Self { dir, image, n_cuts }
    }

    /// Another disk with the same content.
    pub fn copy(&self) -> Self {
        let disk = Self::in_a_folder();
        std::fs::copy(&self.image, &disk.image).unwrap();
        disk
    }

    /// Where a machine mounts it.
    pub fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// The server's data directory on it.
    pub fn data(&self) -> PathBuf {
        self.mount().join("data")
    }

    /// Compiles [`SHIM`], and writes the worker program that loads it too.
    fn shim(&self, unsynced: &str) -> (PathBuf, PathBuf) {
        let (source, library) = (self.dir.path().join("shim.c"), self.dir.path().join("shim.so"));
        std::fs::write(&source, SHIM).unwrap();
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(&source)
            .output()
            .expect("a C compiler, `cc`, starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let program = self.dir.path().join("worker.sh");
        let script = format!(
            "#!/bin/sh\nLD_PRELOAD='{}' LORAD_TEST_UNSYNCED='{unsynced}' exec '{}' \"$@\"\n",
            library.display(),
            env!("CARGO_BIN_EXE_lorad")
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        (library, program)
    }

    /// Turns a machine on that mounts this disk and then does what `script` says.
    pub fn boot(&self, script: &str, variables: &[(&str, &str)]) -> Machine {
        let stderr = std::fs::File::create(self.dir.path().join("stderr")).unwrap();
        let mut child = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"])
            .arg(format!("{MOUNT} || exit 1\n{script}"))
            .env("IMAGE", &self.image)
            .env("MOUNT", self.mount())
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("`unshare` of util-linux starts");
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut machine = Machine { child, stdout };
        assert!(
            machine.line() == "mounted",
            "this test mounts an ext4 image by a loop device in namespaces of its own: run it as root (with CAP_SYS_ADMIN) where \
             /dev/loop-control is there (in a container: --privileged; on a host: modprobe loop)\n{}",
            self.said()
        );
        machine
    }

    /// Turns on a machine with a server; not yet up. `unsynced`: flushes of which files are left out.
    pub fn serve(&self, unsynced: Option<&str>) -> Machine {
        let data = self.data();
        let findings = self.dir.path().join("findings");
        let _ = std::fs::remove_file(&findings);
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (shim, worker) = unsynced.map_or((String::new(), String::new()), |part| {
            let (shim, worker) = self.shim(part);
            (text(&shim), text(&worker))
        });
        let (data, findings) = (text(&data), text(&findings));
        self.boot(
            SERVE,
            &[
                ("PROGRAM", env!("CARGO_BIN_EXE_lorad")),
                ("FINDINGS", &findings),
                ("SHIM", &shim),
                ("LORAD_TEST_UNSYNCED", unsynced.unwrap_or_default()),
                ("LORAD_SCHEDULER__WORKER_PROGRAM", &worker),
                ("LORAD_STORAGE__DATA_DIR", &data),
                ("LORAD_STORAGE__MIN_FREE_BYTES", "1048576"),
                ("LORAD_STORAGE__BALLAST_BYTES", "1048576"),
                ("LORAD_SCHEDULER__THREADS", "1"),
                ("LORAD_SCHEDULER__HEARTBEAT_MS", "100"),
                ("LORAD_SCHEDULER__TICK_MS", "100"),
                ("LORAD_SCHEDULER__ADOPT_WINDOW_MS", "500"),
                ("LORAD_SCHEDULER__RETRY_BACKOFF_MS", "0"),
                ("LORAD_SCHEDULER__MAX_FAILED_ATTEMPTS", "1000"),
            ],
        )
    }

    /// What `lorad fsck` found before the server of this life was started; nothing where there was no database yet.
    pub fn findings(&self) -> Vec<String> {
        let file = self.dir.path().join("findings");
        let Ok(text) = std::fs::read_to_string(file) else {
            return Vec::new();
        };
        match serde_json::from_str::<Vec<Value>>(&text) {
            Ok(findings) => findings.iter().map(ToString::to_string).collect(),
            Err(_) => vec![format!("fsck cannot be made: {}", self.said())],
        }
    }

    /// What the machine wrote to stderr.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }
}

/// A machine: processes and a mount in namespaces of their own, which end with the process that made them.
pub struct Machine {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Machine {
    /// The next line that it prints; empty when it has ended.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The machine's processes.
    fn processes(&self) -> BTreeSet<i32> {
        let namespace = std::fs::read_link(format!("/proc/{}/ns/pid_for_children", self.child.id())).unwrap();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|own| own == namespace))
            .collect()
    }

    /// Where this process sees a folder of the machine.
    pub fn inside(&self, path: &Path) -> PathBuf {
        let first = *self.processes().first().unwrap();
        Path::new(&format!("/proc/{first}/root")).join(path.strip_prefix("/").unwrap())
    }

    /// Stops every thread of every process, also of those that are just being started.
    fn freeze(&self) {
        let is_still = |pid: &i32| {
            let mut threads = std::fs::read_dir(format!("/proc/{pid}/task"))
                .into_iter()
                .flatten()
                .flatten();
            threads.all(|thread| {
                let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ")
                    .is_none_or(|(_, rest)| rest.starts_with(['T', 'Z', 'X']))
            })
        };
        let start = Instant::now();
        loop {
            let processes = self.processes();
            for pid in &processes {
                // One that has just ended is still enough.
                let _ = kill_process(Pid::from_raw(*pid).unwrap(), Signal::STOP);
            }
            if processes.iter().all(is_still) && self.processes() == processes {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the machine cannot be stopped");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Cuts the power: what is in the image now is all that the disk has from now on.
    pub fn cut(self, disk: &mut Disk) {
        self.freeze();
        disk.n_cuts += 1;
        let copy = disk.dir.path().join(format!("{}.img", disk.n_cuts));
        let start = Instant::now();
        // What the device was still writing would make it a copy of two moments.
        loop {
            std::fs::copy(&disk.image, &copy).unwrap();
            if is_same(&disk.image, &copy) {
                break;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the disk of a stopped machine does not come to rest"
            );
        }
        drop(self);
        // The mount goes, and writes what it held, into a file that nobody can open any more.
        std::fs::remove_file(&disk.image).unwrap();
        disk.image = copy;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_same(one: &Path, other: &Path) -> bool {
    let [mut one, mut other] = [one, other].map(|path| std::fs::File::open(path).unwrap());
    let [mut a, mut b] = [vec![0; 1 << 20], vec![0; 1 << 20]];
    for _ in 0..DISK_MIB {
        one.read_exact(&mut a).unwrap();
        other.read_exact(&mut b).unwrap();
        if a != b {
            return false;
        }
    }
    true
}
