//! Processes of this machine: signals, start times, waiting for one that is not a child.

use rustix::process::{Pid, Signal};

pub(super) fn pid(raw: u32) -> Option<Pid> {
    i32::try_from(raw).ok().and_then(Pid::from_raw)
}

/// Signals a process group, which every worker leads.
pub(super) fn signal_group(leader: u32, signal: Signal) {
    let Some(leader) = pid(leader) else { return };
    match rustix::process::kill_process_group(leader, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => tracing::warn!(pid = leader.as_raw_nonzero().get(), %error, "a signal was not delivered"),
    }
}

/// Start time of a process in clock ticks since boot: field 22 of `/proc/<pid>/stat`. `None`: no such process (or it is
/// a zombie, which is as good as dead), or no `/proc`.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_start_time(&stat)
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    // `state` is field 3, so field 22 is the 19th after it.
    fields.nth(18)?.parse().ok()
}

/// Waits until a process that is not our child is gone.
#[cfg_attr(
    target_os = "linux",
    expect(
        deprecated,
        reason = "its successor is unsafe for the sake of borrowed descriptors; an OwnedFd stays open"
    )
)]
pub(super) async fn wait_gone(raw: u32, start: Option<u64>) {
    #[cfg(target_os = "linux")]
    if let Some(pid) = pid(raw)
        && let Ok(fd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK)
        && start_time(raw) == start
        && let Ok(fd) = tokio::io::unix::AsyncFd::new(fd)
    {
        // A pidfd becomes readable when its process ends.
        if fd.readable().await.is_ok() {
            return;
        }
    }
    while is_alive(raw, start) {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

/// Whether this very process lives.
pub(super) fn is_alive(raw: u32, start: Option<u64>) -> bool {
    match start {
        Some(start) => start_time(raw) == Some(start),
        // Without /proc only the pid can be asked for; a reused one looks alive until its lease is over.
        None => pid(raw).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok()),
    }
}

/// Processes of this container that the kernel has killed because memory ran out; 0 where it does not say.
pub(crate) fn out_of_memory_kills() -> u64 {
    let events = std::fs::read_to_string("/sys/fs/cgroup/memory.events").unwrap_or_default();
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_strange_program_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 25 5 1 0 987654 1 2 3";
        assert_eq!(parse_start_time(stat), Some(987_654));
        assert_eq!(parse_start_time(&stat.replace(") S", ") Z")), None);
        assert_eq!(parse_start_time("garbage"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_is_alive_only_under_its_own_start_time() {
        let me = std::process::id();
        let start = start_time(me);
        assert!(start.is_some() && is_alive(me, start));
        assert!(!is_alive(me, start.map(|ticks| ticks + 1)));
    }
}
