//! Counting: how many tests passed and failed, from the summaries that test runners print.

use std::sync::LazyLock;

use regex::Regex;

/// Passed and failed, with the names of what failed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests or checks that passed.
    pub(crate) passed: u64,
    /// Tests or checks that failed.
    pub(crate) failed: u64,
    /// One line for each failure that has a name.
    pub(crate) failures: Vec<String>,
}

impl Tally {
    /// One check that passed or failed.
    pub(crate) fn check(name: &str, ok: bool) -> Self {
        Self {
            passed: u64::from(ok),
            failed: u64::from(!ok),
            failures: if ok { Vec::new() } else { vec![name.to_owned()] },
        }
    }

    /// Adds another tally to this one.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend(other.failures);
    }

    /// A runner that failed without naming a failed test (it did not compile, or crashed) counts as one failure; so does
    /// one that succeeded without running anything, because a filter or a moved folder would otherwise go unnoticed.
    pub(crate) fn with_exit(mut self, what: &str, ok: bool) -> Self {
        if !ok && self.failed == 0 {
            self.failed = 1;
            self.failures
                .push(format!("{what}: stopped before its tests could report"));
        } else if ok && self.passed + self.failed == 0 {
            self.failed = 1;
            self.failures.push(format!("{what}: no test was run"));
        }
        self
    }
}

#[expect(
    clippy::expect_used,
    reason = "invariant: the patterns are constants, covered by the tests below"
)]
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("invariant: a valid pattern")
}

/// Sums the `test result: …` lines of `cargo test`. Ignored tests count as failed: none is allowed to be.
pub(crate) fn cargo_test(stdout: &str) -> Tally {
    static RESULT: LazyLock<Regex> =
        LazyLock::new(|| pattern(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;"));
    static FAILED: LazyLock<Regex> = LazyLock::new(|| pattern(r"^test (.+) \.\.\. (FAILED|ignored)"));
    let mut tally = Tally::default();
    for line in stdout.lines() {
        if let Some(found) = RESULT.captures(line) {
            tally.passed += number(&found[1]);
            tally.failed += number(&found[2]) + number(&found[3]);
        } else if let Some(found) = FAILED.captures(line) {
            tally
                .failures
                .push(format!("{} ({})", &found[1], found[2].to_lowercase()));
        }
    }
    tally
}

/// Reads the summary of `node --test --test-reporter=tap`. Skipped and to-do tests count as failed: the test run installs
/// all that they need.
pub(crate) fn node_tap(stdout: &str) -> Tally {
    static SUMMARY: LazyLock<Regex> = LazyLock::new(|| pattern(r"^# (pass|fail|cancelled|skipped|todo) (\d+)$"));
    static FAILED: LazyLock<Regex> = LazyLock::new(|| pattern(r"^\s*not ok \d+ - (.+)$"));
    let mut tally = Tally::default();
    for line in stdout.lines() {
        if let Some(found) = SUMMARY.captures(line) {
            match &found[1] {
                "pass" => tally.passed += number(&found[2]),
                _ => tally.failed += number(&found[2]),
            }
        } else if let Some(found) = FAILED.captures(line) {
            tally.failures.push(found[1].to_owned());
        }
    }
    tally
}

fn number(digits: &str) -> u64 {
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_summaries_are_summed_over_binaries_and_failures_are_named() {
        let stdout = "running 3 tests\ntest a ... ok\ntest b::c ... FAILED\ntest d ... ignored, slow\n\n\
            test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let tally = cargo_test(stdout);
        assert_eq!((tally.passed, tally.failed), (41, 2));
        assert_eq!(tally.failures, ["b::c (failed)", "d (ignored)"]);
    }

    #[test]
    fn node_summary_is_read_and_skipped_tests_count_as_failed() {
        let stdout = "TAP version 13\nok 1 - opens\nnot ok 2 - clicks\n# tests 4\n# suites 0\n# pass 1\n# fail 1\n\
            # cancelled 0\n# skipped 2\n# todo 0\n# duration_ms 12.5\n";
        let tally = node_tap(stdout);
        assert_eq!((tally.passed, tally.failed), (1, 3));
        assert_eq!(tally.failures, ["clicks"]);
    }

    #[test]
    fn a_runner_that_dies_without_a_summary_counts_as_one_failure() {
        let tally = cargo_test("error: could not compile\n").with_exit("cargo test", false);
        assert_eq!((tally.passed, tally.failed), (0, 1));
    }

    #[test]
    fn a_runner_that_ran_nothing_counts_as_one_failure() {
        let tally = node_tap("# pass 0\n# fail 0\n").with_exit("browser", true);
        assert_eq!((tally.passed, tally.failed), (0, 1));
    }
}
