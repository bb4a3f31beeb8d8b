//! The architecture rules as checks that fail.
//!
//! A [`Rule`] looks at a [`Tree`] (the repository's text files and its crates' dependencies) and names every violation.
//! Each carries a planted violation; before a rule is believed, it must find that one, so that no rule can pass by
//! looking at nothing. What the rules protect is told in `ARCHITECTURE.md`. [`supply`] runs cargo-deny beside them.

mod code;
mod graph;
mod repository;
mod server;
mod supply;
mod trainer;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    io::ErrorKind,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};

use crate::exec;

/// What the rules look at.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tree {
    /// Text of every file that git tracks or would track, by path from the root.
    files: BTreeMap<String, String>,
    /// Paths of the files that are not text, pictures among them.
    binaries: BTreeSet<String>,
    /// Names of all crates that a build of a package links, by [`graph`] query.
    links: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Tree {
    fn read(root: &Path) -> Result<Self> {
        let listed = exec::output(Command::new("git").current_dir(root).args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]))
        .context("list the repository's files (the rules need a git checkout)")?;
        let mut files = BTreeMap::new();
        let mut binaries = BTreeSet::new();
        for path in listed.split('\0').filter(|path| !path.is_empty()) {
            // Deleted but still in the index: no file. Not UTF-8: not text.
            match fs::read_to_string(root.join(path)) {
                Ok(text) => {
                    files.insert(path.to_owned(), text);
                }
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    binaries.insert(path.to_owned());
                }
                Err(_) => {}
            }
        }
        Ok(Self {
            files,
            binaries,
            links: graph::read()?,
        })
    }

    /// For planted violations.
    fn of(files: &[(&str, &str)]) -> Self {
        Self {
            files: files
                .iter()
                .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
                .collect(),
            ..Self::default()
        }
    }

    /// Files below any of the prefixes.
    fn below<'a>(&'a self, prefixes: &'a [&str]) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .iter()
            .filter(|(path, _)| prefixes.iter().any(|prefix| path.starts_with(prefix)))
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }
}

/// One rule.
pub(crate) struct Rule {
    /// Short name.
    name: &'static str,
    /// What goes wrong without it.
    why: &'static str,
    /// Names every violation.
    check: fn(&Tree) -> Vec<String>,
    /// A tree with a violation.
    planted: fn() -> Tree,
}

/// What a rule found.
pub(crate) struct Outcome {
    /// Its name.
    pub(crate) rule: &'static str,
    why: &'static str,
    /// Empty: the rule holds.
    pub(crate) violations: Vec<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.violations.is_empty() {
            return write!(f, "ok    {}", self.rule);
        }
        write!(f, "FAIL  {}: {}", self.rule, self.why)?;
        for violation in &self.violations {
            write!(f, "\n      {violation}")?;
        }
        Ok(())
    }
}

fn rules() -> impl Iterator<Item = &'static Rule> {
    [graph::RULES, server::RULES, trainer::RULES, repository::RULES]
        .into_iter()
        .flatten()
}

/// Applies every rule, cargo-deny's too.
///
/// # Errors
/// If the repository's files or the crates' dependencies cannot be listed.
pub(crate) fn run(root: &Path) -> Result<Vec<Outcome>> {
    let mut outcomes = look(root)?;
    outcomes.push(supply::run(root));
    Ok(outcomes)
}

/// Applies the rules that need nothing but the repository and cargo.
fn look(root: &Path) -> Result<Vec<Outcome>> {
    let tree = Tree::read(root)?;
    Ok(rules().map(|rule| apply(rule, &tree)).collect())
}

fn apply(rule: &Rule, tree: &Tree) -> Outcome {
    let violations = if (rule.check)(&(rule.planted)()).is_empty() {
        vec!["the rule does not find its own planted violation".to_owned()]
    } else {
        (rule.check)(tree)
    };
    Outcome {
        rule: rule.name,
        why: rule.why,
        violations,
    }
}

/// `cargo xtask tidy`.
///
/// # Errors
/// See [`run`].
pub(crate) fn print(root: &Path) -> Result<ExitCode> {
    let outcomes = run(root)?;
    for outcome in &outcomes {
        println!("{outcome}");
    }
    let broken = outcomes.iter().filter(|outcome| !outcome.violations.is_empty()).count();
    println!("{} passed, {broken} failed", outcomes.len() - broken);
    Ok(if broken == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
#[allow(clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_finds_its_planted_violation() {
        for rule in rules() {
            let found = (rule.check)(&(rule.planted)());
            assert!(!found.is_empty(), "rule `{}` misses its planted violation", rule.name);
        }
    }

    #[test]
    fn a_rule_that_finds_nothing_in_its_planted_violation_is_reported_as_broken() {
        let blind = Rule {
            name: "blind",
            why: "",
            check: |_| Vec::new(),
            planted: Tree::default,
        };
        assert_eq!(apply(&blind, &Tree::default()).violations.len(), 1);
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = rules().map(|rule| rule.name).collect();
        assert_eq!(names.len(), rules().count());
    }

    #[test]
    fn the_repository_keeps_every_rule() {
        let root = exec::repository_root().expect("a repository");
        let broken: Vec<_> = look(&root)
            .expect("the rules run")
            .into_iter()
            .filter(|outcome| !outcome.violations.is_empty())
            .map(|outcome| outcome.to_string())
            .collect();
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}
