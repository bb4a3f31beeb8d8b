//! Rules about the repository as a whole: sizes, leftovers, lockfiles, documents.

use std::path::{Component, Path, PathBuf};

use super::{
    Rule, Tree,
    code::{matches, pattern},
};

/// Ask yourself at 800 lines; here the asking ends.
const MAX_LINES: usize = 800;

const CODE: &[&str] = &[".rs", ".js", ".mjs", ".css", ".html", ".py", ".sql", ".sh"];

fn is_code(path: &str) -> bool {
    CODE.iter().any(|ending| path.ends_with(ending)) && !path.starts_with("static/vendor/")
}

fn too_long(tree: &Tree) -> Vec<String> {
    let code = tree.files.iter().filter(|(path, _)| is_code(path));
    let long = code.filter(|(_, text)| text.lines().count() > MAX_LINES);
    long.map(|(path, text)| format!("{path}: {} lines", text.lines().count()))
        .collect()
}

fn words(tree: &Tree, pattern_text: &str) -> Vec<String> {
    let pattern = pattern(pattern_text);
    let texts = tree
        .files
        .iter()
        .filter(|(path, _)| !path.starts_with("static/vendor/"));
    texts.flat_map(|(path, text)| matches(path, text, &pattern)).collect()
}

fn without_module_doc(tree: &Tree) -> Vec<String> {
    let sources = tree
        .below(&["src/", "crates/", "tests/"])
        .filter(|(path, _)| path.ends_with(".rs"));
    let bare = sources.filter(|(_, text)| !text.trim_start().starts_with("//!"));
    bare.map(|(path, _)| format!("{path}: does not start with `//!`"))
        .collect()
}

fn lockfiles(tree: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    let foreign_source = pattern(r#"(?m)^source = "[^"]*""#);
    let resolved = pattern(r#""resolved":\s*"[^"]*""#);
    let index = pattern(r"(?m)^(-i\b|--\S*index-url|--find-links).*$|https?://\S+");
    for (path, text) in &tree.files {
        match Path::new(path).file_name().and_then(|name| name.to_str()) {
            Some("Cargo.lock") => found.extend(
                matches(path, text, &foreign_source)
                    .into_iter()
                    .filter(|line| !line.contains("registry+https://github.com/rust-lang/crates.io-index")),
            ),
            Some("package-lock.json") => found.extend(matches(path, text, &resolved)),
            Some("requirements.txt") => found.extend(matches(path, text, &index)),
            _ => {}
        }
    }
    found
}

fn unlinked_decisions(tree: &Tree) -> Vec<String> {
    let decisions = tree
        .below(&["docs/adr/"])
        .filter(|(path, _)| path.ends_with(".md") && !path.ends_with("README.md"));
    decisions
        .filter(|(path, _)| {
            let name = path.rsplit('/').next().unwrap_or(path);
            !tree
                .files
                .iter()
                .any(|(other, text)| other.ends_with(".md") && other != path && text.contains(name))
        })
        .map(|(path, _)| format!("{path}: no document links to it"))
        .collect()
}

fn changelog(tree: &Tree) -> Vec<String> {
    match tree.files.get("CHANGELOG.md") {
        Some(text) if text.lines().any(|line| line.trim_end() == "## Unreleased") => Vec::new(),
        Some(_) => vec!["CHANGELOG.md: no section `## Unreleased`".to_owned()],
        None => vec!["CHANGELOG.md: missing".to_owned()],
    }
}

/// Relative links of Markdown files that lead nowhere.
fn dead_links(tree: &Tree) -> Vec<String> {
    let link = pattern(r"\]\(([^)\s]+)\)");
    let mut found = Vec::new();
    for (path, text) in tree.files.iter().filter(|(path, _)| path.ends_with(".md")) {
        for captures in link.captures_iter(text) {
            let target = captures[1].split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let joined = normal(&Path::new(path).parent().unwrap_or(Path::new("")).join(target));
            let folder = format!("{joined}/");
            let known = tree.binaries.contains(&joined)
                || tree
                    .files
                    .keys()
                    .any(|file| *file == joined || file.starts_with(&folder));
            if !known {
                found.push(format!("{path}: link to {target}"));
            }
        }
    }
    found
}

fn normal(path: &Path) -> String {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                parts.pop();
            }
            Component::CurDir => {}
            other => parts.push(other),
        }
    }
    parts.to_string_lossy().into_owned()
}

/// The rules.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "no file is longer than 800 lines",
        why: "a file is read in one sitting",
        check: too_long,
        planted: || Tree::of(&[("src/a.rs", &"\n".repeat(MAX_LINES + 1))]),
    },
    Rule {
        name: "every module says what it is",
        why: "a reader learns what a file is for, and what it must not know, from its first lines",
        check: without_module_doc,
        planted: || Tree::of(&[("src/a.rs", "use std::fs;")]),
    },
    Rule {
        name: "no path of a developer's machine",
        why: "the repository works anywhere",
        check: |tree| words(tree, concat!("/(", "work|ro", r"ot)/[A-Za-z.]|/home/[a-z]+/")),
        planted: || Tree::of(&[("a.md", concat!("see /wo", "rk/main"))]),
    },
    Rule {
        name: "no unfinished marks",
        why: "what is missing is an issue or a line in the changelog",
        check: |tree| words(tree, concat!(r"\b(TO", "DO|FIX", "ME|XX", r"X)\b")),
        planted: || Tree::of(&[("src/a.rs", concat!("// TO", "DO: later"))]),
    },
    Rule {
        name: "no ignored test",
        why: "a test that does not run protects nothing",
        check: |tree| {
            words(
                tree,
                concat!(r"#\[ign", r"ore|\b(test|describe|it)\.(skip|todo|only)\("),
            )
        },
        planted: || Tree::of(&[("src/a.rs", concat!("#[ign", "ore] #[test]"))]),
    },
    Rule {
        name: "lockfiles name no registry host but the default",
        why: "a mirror of one machine must not become everyone's source",
        check: lockfiles,
        planted: || {
            Tree::of(&[(
                "tests/browser/package-lock.json",
                r#"{"resolved": "https://mirror.example/a.tgz"}"#,
            )])
        },
    },
    Rule {
        name: "every decision record is linked",
        why: "one that nobody finds is decided again",
        check: unlinked_decisions,
        planted: || Tree::of(&[("docs/adr/0001-a.md", "# a"), ("README.md", "")]),
    },
    Rule {
        name: "links between documents lead somewhere",
        why: "a moved file breaks its readers silently",
        check: dead_links,
        planted: || Tree::of(&[("docs/a.md", "[b](b.md)")]),
    },
    Rule {
        name: "the changelog has an unreleased section",
        why: "a change is described in the commit that makes it",
        check: changelog,
        planted: || Tree::of(&[("CHANGELOG.md", "## 0.1.0")]),
    },
];
