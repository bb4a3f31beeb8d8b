//! Rules inside the trainer: layers know no family, the loop knows only tasks, families do not know each other.

use std::collections::BTreeSet;

use super::{
    Rule, Tree,
    code::{in_code, matches, pattern, without_comments},
};

const FAMILIES: &str = "crates/lorad-train/src/families/";

/// Folder names below `families/`.
fn families(tree: &Tree) -> BTreeSet<&str> {
    tree.below(&[FAMILIES])
        .filter_map(|(path, _)| Some(path.strip_prefix(FAMILIES)?.split_once('/')?.0))
        .collect()
}

fn cross_imports(tree: &Tree) -> Vec<String> {
    let families = families(tree);
    let mut found = Vec::new();
    for (path, source) in tree.below(&[FAMILIES]) {
        let Some((own, _)) = path.strip_prefix(FAMILIES).and_then(|rest| rest.split_once('/')) else {
            continue;
        };
        for other in families.iter().filter(|family| **family != own) {
            found.extend(matches(
                path,
                &without_comments(source),
                &pattern(&format!(r"\b{other}::")),
            ));
        }
    }
    found
}

/// The rules.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "layers know no family",
        why: "ops, nn, lora, optim, data, diffusion and export serve every family",
        check: |tree| {
            in_code(
                tree.below(&[
                    "crates/lorad-train/src/ops/",
                    "crates/lorad-train/src/nn/",
                    "crates/lorad-train/src/lora/",
                    "crates/lorad-train/src/optim/",
                    "crates/lorad-train/src/data/",
                    "crates/lorad-train/src/diffusion/",
                ]),
                r"\bfamilies::",
            )
        },
        planted: || Tree::of(&[("crates/lorad-train/src/nn/linear.rs", "use crate::families::sd1::Unet;")]),
    },
    Rule {
        name: "the loop knows only tasks",
        why: "there is one training loop for all families",
        check: |tree| in_code(tree.below(&["crates/lorad-train/src/run.rs"]), r"\bfamilies\b"),
        planted: || Tree::of(&[("crates/lorad-train/src/run.rs", "use crate::families::FAMILIES;")]),
    },
    Rule {
        name: "families do not import each other",
        why: "a family can be read, changed and removed alone; what two share moves up",
        check: cross_imports,
        planted: || {
            Tree::of(&[
                (
                    "crates/lorad-train/src/families/a/mod.rs",
                    "use crate::families::b::keys;",
                ),
                ("crates/lorad-train/src/families/b/mod.rs", "pub mod keys;"),
            ])
        },
    },
];
