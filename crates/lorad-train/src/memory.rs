//! How much memory there is, and how much this process has taken. Knows Linux's files; elsewhere the answer is "unknown".

use std::fs;

/// Bytes of the machine, or of the container if it may take less; `None` if the system does not say.
pub fn total_bytes() -> Option<u64> {
    let machine = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    let limits = [number("/sys/fs/cgroup/memory.max"), data_limit()];
    Some(limits.into_iter().flatten().fold(machine, u64::min))
}

/// Bytes that can be taken without swapping, within the limits of container and process; `None` if the system does not say.
pub fn available_bytes() -> Option<u64> {
    let free = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let container = number("/sys/fs/cgroup/memory.max").zip(cgroup_used());
    let process = data_limit().zip(status("VmData:"));
    let left = |(limit, used): (u64, u64)| limit.saturating_sub(used);
    Some(
        [container, process]
            .into_iter()
            .flatten()
            .map(left)
            .fold(free, u64::min),
    )
}

/// Bytes of this process that are in memory now; 0 if the system does not say.
pub fn resident_bytes() -> u64 {
    status("VmRSS:").unwrap_or(0)
}

/// Most bytes of this process that were ever in memory; `None` if the system does not say.
pub fn peak_resident_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// What the container has taken, without cached files that it would give back.
fn cgroup_used() -> Option<u64> {
    let stat = fs::read_to_string("/sys/fs/cgroup/memory.stat").ok()?;
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    let cached = cached.and_then(|n| n.parse().ok()).unwrap_or(0);
    Some(number("/sys/fs/cgroup/memory.current")?.saturating_sub(cached))
}

/// What this process may write to (`RLIMIT_DATA`), if that is limited.
fn data_limit() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max data size"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn status(name: &str) -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, name)
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A line `name: 123 kB`, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kb| kb * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_read_in_bytes() {
        assert_eq!(
            field("MemTotal: 9 kB\nMemAvailable:    12 kB\n", "MemAvailable:"),
            Some(12288)
        );
        assert_eq!(field("MemTotal: 9 kB\n", "MemAvailable:"), None);
    }
}
