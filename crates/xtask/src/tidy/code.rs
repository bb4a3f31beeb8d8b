//! Reading Rust source as text, as far as the rules need: code without its comments, and searches that name the line.

use regex::Regex;

/// The source with comments blanked (line by line, so that line numbers stay). A `//` inside a string literal ends the
/// line too; the rules' patterns never stand after one.
pub(super) fn without_comments(source: &str) -> String {
    source
        .lines()
        .map(|line| {
            if line.trim_start().starts_with("//") {
                ""
            } else {
                line.split(" // ").next().unwrap_or("")
            }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// `path:line: matched` for every match of the pattern.
pub(super) fn matches(path: &str, text: &str, pattern: &Regex) -> Vec<String> {
    pattern
        .find_iter(text)
        .map(|found| {
            let line = text[..found.start()].matches('\n').count() + 1;
            format!("{path}:{line}: `{}`", found.as_str().trim())
        })
        .collect()
}

/// A constant pattern.
#[expect(
    clippy::expect_used,
    reason = "invariant: the patterns are constants, each used by a planted violation"
)]
pub(super) fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("invariant: a valid pattern")
}

/// Matches in the code (not the comments) of all given Rust files.
pub(super) fn in_code<'a>(files: impl Iterator<Item = (&'a str, &'a str)>, text: &str) -> Vec<String> {
    let pattern = pattern(text);
    files
        .filter(|(path, _)| path.ends_with(".rs"))
        .flat_map(|(path, source)| matches(path, &without_comments(source), &pattern))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_do_not_count_as_code_and_lines_keep_their_numbers() {
        let source = "//! Knows no axum.\nuse std::fs; // not axum\nuse axum::Router;\n";
        let found = in_code([("a.rs", source)].into_iter(), r"\baxum\b");
        assert_eq!(found, ["a.rs:3: `axum`"]);
    }
}
