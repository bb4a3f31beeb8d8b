//! How much memory there is to take. Knows Linux's files; elsewhere the answer is "unknown".

use std::fs;

/// Bytes that can be taken without swapping, within the container's limit; `None` if the system does not say.
pub(crate) fn available_bytes() -> Option<u64> {
    let free = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max");
    let used = number("/sys/fs/cgroup/memory.current");
    Some(match (limit, used) {
        (Some(limit), Some(used)) => free.min(limit.saturating_sub(used)),
        _ => free,
    })
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
