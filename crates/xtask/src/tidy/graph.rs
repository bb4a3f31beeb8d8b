//! Rules about what links what: the server no tensor library, the trainer no web or database, the protocol no I/O.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use super::{Rule, Tree};
use crate::exec;

const SERVER: &str = "lorad --no-default-features";
const TRAINER: &str = "lorad-train";
const PROTO: &str = "lorad-proto";

/// All crates that each of the three links (normal dependencies, all targets).
pub(super) fn read() -> Result<BTreeMap<&'static str, BTreeSet<String>>> {
    [SERVER, TRAINER, PROTO]
        .into_iter()
        .map(|query| {
            let mut command = exec::cargo(["tree", "--locked", "--edges", "normal", "--prefix", "none"]);
            command
                .args(["--format", "{lib}", "--target", "all", "--package"])
                .args(query.split(' '));
            let text = exec::output(&mut command).with_context(|| format!("cargo tree -p {query}"))?;
            // `{lib}` is the name as code writes it (underscores), empty for a package without a library.
            Ok((
                query,
                text.lines()
                    .map(|line| line.trim().replace('_', "-"))
                    .filter(|l| !l.is_empty())
                    .collect(),
            ))
        })
        .collect()
}

/// Crates of `query` that are banned there. Also reports a list that is missing or empty, so that a failed query cannot
/// pass.
fn banned(tree: &Tree, query: &str, bans: &[&str]) -> Vec<String> {
    let Some(links) = tree.links.get(query).filter(|links| !links.is_empty()) else {
        return vec![format!("cargo tree -p {query}: nothing listed")];
    };
    bans.iter()
        .filter(|ban| links.contains(**ban))
        .map(|ban| format!("{query} links {ban}"))
        .collect()
}

fn planted(query: &'static str, links: &[&str]) -> Tree {
    let mut tree = Tree::default();
    tree.links
        .insert(query, links.iter().map(|&name| name.to_owned()).collect());
    tree
}

/// The rules.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "the server links no tensor library",
        why: "a fault in one must cost a job, not the server: models live in worker processes (ADR 2)",
        check: |tree| {
            banned(
                tree,
                SERVER,
                &[
                    "candle-core",
                    "candle-nn",
                    "candle-transformers",
                    "tokenizers",
                    "image",
                    "safetensors",
                ],
            )
        },
        planted: || planted(SERVER, &["axum", "candle-core"]),
    },
    Rule {
        name: "the trainer links no web, database or async runtime",
        why: "it must be usable, testable and debuggable as a plain library",
        check: |tree| {
            banned(
                tree,
                TRAINER,
                &["axum", "hyper", "reqwest", "sqlx", "sqlx-core", "tokio"],
            )
        },
        planted: || planted(TRAINER, &["candle-core", "tokio"]),
    },
    Rule {
        name: "the protocol links no I/O",
        why: "both sides depend on it: what it links, both link",
        check: |tree| {
            banned(
                tree,
                PROTO,
                &[
                    "axum",
                    "hyper",
                    "reqwest",
                    "sqlx",
                    "sqlx-core",
                    "tokio",
                    "candle-core",
                    "utoipa",
                    "object-store",
                ],
            )
        },
        planted: || planted(PROTO, &["serde", "utoipa"]),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_dependency_list_is_a_violation() {
        assert_eq!(banned(&Tree::default(), SERVER, &["candle-core"]).len(), 1);
    }
}
