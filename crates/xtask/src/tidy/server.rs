//! Rules inside the server's `src/` and the protocol crate.

use super::{Rule, Tree, code::in_code};

/// Files below `src/`, without the exempt prefixes.
fn server<'a>(tree: &'a Tree, exempt: &'a [&str]) -> impl Iterator<Item = (&'a str, &'a str)> {
    tree.below(&["src/"])
        .filter(|(path, _)| !exempt.iter().any(|prefix| path.starts_with(prefix)))
}

/// The rules.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "only src/trainer.rs names the trainer",
        why: "the server builds and tests without it",
        check: |tree| in_code(server(tree, &["src/trainer.rs"]), r"\b(lorad_train|candle_\w+)\b"),
        planted: || Tree::of(&[("src/cli/train.rs", "fn f() { lorad_train::run::run(); }")]),
    },
    Rule {
        name: "the domain knows neither web nor database",
        why: "the job state machine is tested without either",
        check: |tree| {
            in_code(
                tree.below(&["src/domain/"]),
                r"\b(axum|sqlx|hyper|tower_http|tokio|crate::(http|store))\b",
            )
        },
        planted: || Tree::of(&[("src/domain/job.rs", "use sqlx::Row;")]),
    },
    Rule {
        name: "only the store holds SQL",
        why: "fences, transactions and indexes are reviewed in one place",
        check: |tree| {
            let mut found = in_code(
                server(tree, &["src/store/"]),
                r"\bsqlx::(query\w*|raw_sql|QueryBuilder)\b",
            );
            found.extend(in_code(
                server(tree, &["src/store/"]),
                r#""\\?\s*(SELECT|INSERT (INTO|OR)|UPDATE \w+ SET|DELETE FROM|CREATE (TABLE|INDEX)|ALTER TABLE|PRAGMA|BEGIN IMMEDIATE)\b"#,
            ));
            found
        },
        planted: || Tree::of(&[("src/scheduler/mod.rs", "let sql = \"\n  SELECT id FROM jobs\";")]),
    },
    Rule {
        name: "every write passes a fault point",
        why: "a step that makes something durable without one is a step at which no test dies (ADR 15)",
        check: |tree| {
            let committing = server(tree, &["src/store/mod.rs", "src/store/tests.rs", "src/store/model.rs"]);
            let mut found = in_code(committing, r"\.commit\(\)");
            // What is left out copies the database or changes a copy.
            let writing = server(tree, &["src/store/mod.rs", "src/store/upkeep.rs"]);
            found.extend(in_code(writing, r"&self\.writer\b"));
            found
        },
        planted: || Tree::of(&[("src/store/jobs.rs", "tx.commit().await?;")]),
    },
    Rule {
        name: "only http knows status codes",
        why: "one table maps error codes to statuses; beside it only the two ends of the worker protocol",
        check: |tree| {
            in_code(
                server(tree, &["src/http/", "src/agent_api.rs", "src/agent/"]),
                r"\bStatusCode\b",
            )
        },
        planted: || Tree::of(&[("src/store/error.rs", "use axum::http::StatusCode;")]),
    },
    Rule {
        name: "anyhow only in the command line",
        why: "everywhere else an error has a type, a code and a hint",
        check: |tree| in_code(server(tree, &["src/cli/", "src/main.rs"]), r"\banyhow\b"),
        planted: || Tree::of(&[("src/blobs.rs", "use anyhow::Result;")]),
    },
    Rule {
        name: "wire types, HTTP bodies and database rows are three sets",
        why: "renaming one must not silently change another",
        check: |tree| {
            let mut found = in_code(tree.below(&["src/http/"]), r"\b(FromRow|sqlx::Type)\b");
            found.extend(in_code(tree.below(&["src/store/"]), r"\b(ToSchema|utoipa)\b"));
            found.extend(in_code(
                tree.below(&["crates/lorad-proto/src/"]),
                r"\b(ToSchema|FromRow|utoipa|sqlx)\b",
            ));
            found
        },
        planted: || Tree::of(&[("src/store/jobs.rs", "#[derive(FromRow, ToSchema)] struct Row;")]),
    },
    Rule {
        name: "the protocol does no I/O",
        why: "serde types only, so that any build of either side can read them",
        check: |tree| {
            in_code(
                tree.below(&["crates/lorad-proto/src/"]),
                r"\b(std::(fs|net|process|io)|tokio|reqwest)\b",
            )
        },
        planted: || Tree::of(&[("crates/lorad-proto/src/spec.rs", "use std::fs;")]),
    },
];
