//! Rules about what dependencies may be: licences, banned crates, sources. The lists stand in `deny.toml`, which cargo-deny
//! reads too; building that tool takes longer than the whole check.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::{Rule, Tree};
use crate::exec;

/// The lists of `deny.toml`, as far as they are checked here.
#[derive(Debug, Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}

#[derive(Debug, Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Debug, Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// A crate of the lock file.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// `None`: part of this repository.
    source: Option<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

/// All crates that the builds that ship could use, on any target.
pub(super) fn read() -> Result<Vec<Package>> {
    let text = exec::output(&mut exec::cargo([
        "metadata",
        "--locked",
        "--features",
        "cuda",
        "--format-version",
        "1",
    ]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("read cargo's metadata")?;
    Ok(metadata.packages)
}

const LISTS: &str = "deny.toml";

/// Applies a check to every crate. A missing list or graph is a violation, so that no failed query can pass.
fn every(tree: &Tree, fault: impl Fn(&Deny, &Package) -> Option<String>) -> Vec<String> {
    let Some(text) = tree.files.get(LISTS) else {
        return vec![format!("{LISTS}: missing")];
    };
    let deny: Deny = match toml::from_str(text) {
        Ok(deny) => deny,
        Err(error) => return vec![format!("{LISTS}: {error}")],
    };
    if tree.packages.is_empty() {
        return vec!["cargo metadata: nothing listed".to_owned()];
    }
    tree.packages
        .iter()
        .filter_map(|package| {
            Some(format!(
                "{} {}: {}",
                package.name,
                package.version,
                fault(&deny, package)?
            ))
        })
        .collect()
}

/// Whether an SPDX expression can be met with allowed licences. `A/B` is how old manifests write `A OR B`.
fn is_met(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let text = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut at = 0;
    any_of(&words, &mut at, allowed) && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut met = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all_of(words, at, allowed);
    }
    met
}

fn all_of(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let met = any_of(words, at, allowed);
        let is_closed = words.get(*at) == Some(&")");
        *at += 1;
        return met && is_closed;
    }
    match (words.get(*at), words.get(*at + 1)) {
        (Some(&"WITH"), Some(exception)) => {
            *at += 2;
            allowed(&format!("{word} WITH {exception}"))
        }
        _ => allowed(word),
    }
}

fn licence_fault(deny: &Deny, package: &Package) -> Option<String> {
    let Some(licence) = &package.license else {
        return Some("names no licence".to_owned());
    };
    let exception = deny.licenses.exceptions.iter().find(|e| e.name == package.name);
    let allowed = |name: &str| {
        let mut also = exception.iter().flat_map(|e| &e.allow);
        deny.licenses.allow.iter().any(|a| a == name) || also.any(|a| a == name)
    };
    (!is_met(licence, &allowed)).then(|| format!("licence {licence}"))
}

fn source_fault(deny: &Deny, package: &Package) -> Option<String> {
    let source = package.source.as_ref()?;
    let known = source
        .strip_prefix("registry+")
        .is_some_and(|registry| deny.sources.allow_registry.iter().any(|allowed| allowed == registry));
    (!known).then(|| format!("comes from {source}"))
}

/// A tree with the real lists and one crate.
fn planted(name: &str, licence: &str, source: &str) -> Tree {
    let package = Package {
        name: name.to_owned(),
        version: "1.0.0".to_owned(),
        license: Some(licence.to_owned()),
        source: Some(source.to_owned()),
    };
    Tree {
        files: BTreeMap::from([(LISTS.to_owned(), include_str!("../../../../deny.toml").to_owned())]),
        packages: vec![package],
        ..Tree::default()
    }
}

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// The rules.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "every dependency's licence is permissive",
        why: "who ships the binary must owe a notice and nothing else",
        check: |tree| every(tree, licence_fault),
        planted: || planted("copyleft", "MIT AND GPL-3.0-only", CRATES_IO),
    },
    Rule {
        name: "no banned crate",
        why: "each is banned for a reason that stands in deny.toml",
        check: |tree| {
            every(tree, |deny, package| {
                let banned = deny.bans.deny.iter().any(|ban| ban.name == package.name);
                banned.then(|| "is banned".to_owned())
            })
        },
        planted: || planted("openssl-sys", "MIT", CRATES_IO),
    },
    Rule {
        name: "dependencies come from crates.io",
        why: "a branch of a repository can change or vanish under a lock file",
        check: |tree| every(tree, source_fault),
        planted: || planted("fork", "MIT", "git+https://example.org/fork"),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions_are_met_as_spdx_says() {
        let allowed = |name: &str| ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].contains(&name);
        for met in [
            "MIT",
            "GPL-3.0-only OR MIT",
            "MIT/Apache-2.0",
            "(MIT OR GPL-2.0) AND Apache-2.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(is_met(met, &allowed), "{met}");
        }
        for unmet in [
            "GPL-3.0-only",
            "MIT AND GPL-3.0-only",
            "Apache-2.0 WITH Classpath-exception",
            "(MIT",
            "",
            "MIT MIT",
        ] {
            assert!(!is_met(unmet, &allowed), "{unmet}");
        }
    }
}
