//! The rule about what dependencies may be: cargo-deny by the lists of `deny.toml`, over every crate of this workspace with the
//! features of the images that ship, on all targets. No advisories: their database is a repository to be cloned.
//!
//! Not a [`super::Rule`], which looks at a tree and runs nothing: cargo-deny is installed first ([`provision::cargo_deny`]). It
//! carries planted violations all the same.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::Outcome;
use crate::provision;

const RULE: &str = "dependencies: permissive licences, nothing banned, from crates.io only";
const WHY: &str = "each of the lists in deny.toml says why";

/// What cargo-deny checks here.
const CHECKS: [&str; 3] = ["licenses", "bans", "sources"];

/// A line of cargo-deny's output.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", content = "fields", rename_all = "lowercase")]
enum Line {
    Diagnostic(Diagnostic),
    /// Counts by check.
    Summary(std::collections::BTreeMap<String, Counts>),
    Log {
        message: String,
    },
}

#[derive(Debug, Deserialize)]
struct Counts {
    errors: u64,
}

#[derive(Debug, Deserialize)]
struct Diagnostic {
    #[serde(default)]
    code: String,
    severity: String,
    message: String,
    #[serde(default)]
    labels: Vec<Label>,
    #[serde(default)]
    graphs: Vec<Graph>,
}

#[derive(Debug, Deserialize)]
struct Label {
    message: String,
    span: String,
}

/// A crate and, not read here, who depends on it.
#[derive(Debug, Deserialize)]
struct Graph {
    #[serde(rename = "Krate")]
    krate: Krate,
}

#[derive(Debug, Deserialize)]
struct Krate {
    name: String,
    version: String,
}

/// A violation: the kind that cargo-deny gives it, and what it says.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    code: String,
    text: String,
}

impl From<Diagnostic> for Violation {
    fn from(found: Diagnostic) -> Self {
        let mut parts: Vec<String> = found
            .graphs
            .iter()
            .map(|graph| format!("{} {}", graph.krate.name, graph.krate.version))
            .collect();
        parts.push(found.message);
        parts.extend(
            found
                .labels
                .iter()
                .map(|label| format!("{} {}", label.span, label.message).trim().to_owned()),
        );
        Self {
            code: found.code,
            text: parts.join(": "),
        }
    }
}

/// Reads what cargo-deny wrote to stderr.
///
/// # Errors
/// If it did not come to its end (a list that it cannot read, a dependency graph that it did not get), or counted other errors
/// than it told.
fn read(output: &str) -> Result<Vec<Violation>> {
    let (mut violations, mut counts, mut said) = (Vec::new(), None, Vec::new());
    for line in output.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Diagnostic(found)) if found.severity == "error" => violations.push(Violation::from(found)),
            Ok(Line::Diagnostic(_)) => {}
            Ok(Line::Summary(found)) => counts = Some(found),
            Ok(Line::Log { message }) => said.push(message),
            Err(_) => said.push(line.to_owned()),
        }
    }
    let Some(counts) = counts else {
        said.extend(violations.into_iter().map(|violation| violation.text));
        bail!("cargo-deny did not come to its end: {}", said.join("; "));
    };
    let mut counted = 0;
    for check in CHECKS {
        let found = counts.get(check);
        counted += found
            .with_context(|| format!("cargo-deny did not check {check}"))?
            .errors;
    }
    ensure!(
        counted == u64::try_from(violations.len())?,
        "cargo-deny counts {counted} violations and tells {}: {}",
        violations.len(),
        said.join("; ")
    );
    Ok(violations)
}

fn deny(program: &Path, root: &Path, lists: &Path) -> Result<Vec<Violation>> {
    let output = Command::new(program)
        .current_dir(root)
        .args(["--locked", "--workspace", "--format", "json", "--config"])
        .arg(lists)
        .arg("check")
        .args(CHECKS)
        .output()
        .with_context(|| format!("start {}", program.display()))?;
    let violations = read(&String::from_utf8_lossy(&output.stderr))?;
    ensure!(
        output.status.success() == violations.is_empty(),
        "cargo-deny found {} violations and ended with {}",
        violations.len(),
        output.status
    );
    Ok(violations)
}

/// The lists with a violation of each kind: a crate of this workspace is banned, a licence in use and the registry are struck out.
fn planted(lists: &str) -> Result<String> {
    let mut planted = lists.to_owned();
    for (real, wrong) in [
        ("{ crate = \"pyo3\" }", "{ crate = \"serde\" }"),
        ("    \"BSD-3-Clause\",\n", ""),
        (
            "allow-registry = [\"https://github.com/rust-lang/crates.io-index\"]",
            "allow-registry = []",
        ),
    ] {
        ensure!(
            planted.contains(real),
            "deny.toml holds no {real:?} to plant a violation in"
        );
        planted = planted.replace(real, wrong);
    }
    Ok(planted)
}

/// What cargo-deny must say to [`planted`].
const MUST_FIND: [(&str, &str); 3] = [
    ("banned", "serde"),
    ("rejected", "BSD-3-Clause"),
    ("source-not-allowed", "crates.io-index"),
];

/// Those of [`MUST_FIND`] that are not among the violations.
fn missed(violations: &[Violation]) -> Vec<String> {
    MUST_FIND
        .iter()
        .filter(|(code, part)| {
            !violations
                .iter()
                .any(|found| found.code == *code && found.text.contains(part))
        })
        .map(|(code, part)| format!("the rule does not find its own planted violation ({code}: {part})"))
        .collect()
}

fn check(root: &Path) -> Result<Vec<String>> {
    let program = provision::cargo_deny(root)?;
    let lists = root.join("deny.toml");
    let text = fs::read_to_string(&lists).with_context(|| format!("read {}", lists.display()))?;
    let dir = tempfile::tempdir().context("make a temporary folder")?;
    let wrong = dir.path().join("deny.toml");
    fs::write(&wrong, planted(&text)?).with_context(|| format!("write {}", wrong.display()))?;
    let missed = missed(&deny(&program, root, &wrong)?);
    if !missed.is_empty() {
        return Ok(missed);
    }
    let violations = deny(&program, root, &lists)?;
    Ok(violations
        .into_iter()
        .map(|violation| format!("{}: {}", violation.code, violation.text))
        .collect())
}

/// The rule, with cargo-deny installed first. A check that cannot be made is a violation: nothing passes unseen.
pub(super) fn run(root: &Path) -> Outcome {
    Outcome {
        rule: RULE,
        why: WHY,
        violations: check(root).unwrap_or_else(|error| vec![format!("{error:#}")]),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SUMMARY: &str = r#"{"fields":{"bans":{"errors":1,"helps":0,"notes":0,"warnings":0},"licenses":{"errors":0,"helps":4,"notes":0,"warnings":0},"sources":{"errors":0,"helps":0,"notes":0,"warnings":0}},"type":"summary"}"#;
    const BANNED: &str = r#"{"fields":{"code":"banned","graphs":[{"Krate":{"name":"serde","version":"1.0.229"},"parents":[]}],"labels":[{"column":16,"line":33,"message":"banned here","span":"serde"}],"message":"crate 'serde = 1.0.229' is explicitly banned","severity":"error"},"type":"diagnostic"}"#;
    const HELP: &str = r#"{"fields":{"code":"accepted","labels":[],"message":"license requirements satisfied","severity":"help"},"type":"diagnostic"}"#;

    #[test]
    fn an_error_is_a_violation_with_its_crate_and_anything_milder_is_none() {
        let found = read(&[BANNED, HELP, SUMMARY].join("\n")).unwrap();
        let text = "serde 1.0.229: crate 'serde = 1.0.229' is explicitly banned: serde banned here";
        assert_eq!(
            found,
            [Violation {
                code: "banned".to_owned(),
                text: text.to_owned()
            }]
        );
        assert_eq!(missed(&found).len(), 2, "{found:?}");
    }

    #[test]
    fn output_that_is_cut_off_incomplete_or_contradicts_itself_is_an_error() {
        let log = r#"{"fields":{"level":"ERROR","message":"failed to deserialize config"},"type":"log"}"#;
        let unchecked = SUMMARY.replace("\"licenses\"", "\"advisories\"");
        for (output, part) in [
            (String::new(), "did not come to its end"),
            (log.to_owned(), "failed to deserialize config"),
            (BANNED.to_owned(), "explicitly banned"),
            (SUMMARY.to_owned(), "counts 1 violations and tells 0"),
            ([BANNED, &unchecked].join("\n"), "did not check licenses"),
        ] {
            let error = read(&output).unwrap_err().to_string();
            assert!(error.contains(part), "{part} is missing in {error}");
        }
    }

    #[test]
    fn a_violation_can_be_planted_in_the_lists() {
        let lists = include_str!("../../../../deny.toml");
        let planted: toml::Table = planted(lists).unwrap().parse().unwrap();
        assert_ne!(planted, lists.parse().unwrap());
        assert!(super::planted("").is_err());
    }
}
