//! Which names in an upload are acceptable, which are ignored, and which are duplicates.
//!
//! Pure. No name from an upload is ever used as a path, yet a name that would escape says that the archive was made to
//! harm, so the whole upload is refused.

use unicode_normalization::UnicodeNormalization as _;

/// A name's fault: code and sentence.
pub(super) type Fault = (&'static str, &'static str);

/// Longest component in bytes (what Linux file systems allow).
const MAX_COMPONENT_BYTES: usize = 255;
/// Longest name in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// Checks a name and brings it into its plain form: no `.` components, no doubled slashes, no trailing slash. An empty
/// result is the archive's root.
pub(super) fn checked(raw: &str) -> Result<String, Fault> {
    if raw.contains('\0') {
        return Err(("entry.nul_in_name", "the name holds a NUL character"));
    }
    if raw.chars().any(char::is_control) {
        return Err(("entry.control_in_name", "the name holds control characters"));
    }
    if raw.contains('\\') {
        return Err((
            "entry.backslash_in_name",
            "the name holds a backslash; archives separate folders by `/`",
        ));
    }
    if raw.starts_with('/') {
        return Err(("entry.absolute_path", "the name is an absolute path"));
    }
    let mut chars = raw.chars();
    if chars.next().is_some_and(|c| c.is_ascii_alphabetic()) && chars.next() == Some(':') {
        return Err(("entry.absolute_path", "the name starts with a drive letter"));
    }
    if raw.len() > MAX_NAME_BYTES {
        return Err(("entry.name_too_long", "the name is longer than 1024 bytes"));
    }
    let mut parts = Vec::new();
    for part in raw.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(("entry.path_traversal", "the name climbs out of its folder with `..`")),
            _ if part.len() > MAX_COMPONENT_BYTES => {
                return Err(("entry.name_too_long", "a part of the name is longer than 255 bytes"));
            }
            _ if is_device_name(part) => {
                return Err(("entry.device_name", "the name is a device on Windows; rename the file"));
            }
            _ => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

/// `CON`, `NUL`, `COM1.txt`, …: names that open a device on Windows, with any extension.
fn is_device_name(part: &str) -> bool {
    let stem = part.split('.').next().unwrap_or(part).trim_end().to_ascii_uppercase();
    matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (stem.len() == 4
            && (stem.starts_with("COM") || stem.starts_with("LPT"))
            && stem.ends_with(|c: char| ('1'..='9').contains(&c)))
}

/// Two names with equal folds are one file on some system: compatibility-normalised and lower case.
pub(super) fn fold(name: &str) -> String {
    name.nfkc().flat_map(char::to_lowercase).nfkc().collect()
}

/// Why a file is not data, if it is not: system leftovers, hidden files, notices.
pub(super) fn ignored(name: &str) -> Option<&'static str> {
    if name.split('/').any(|p| p == "__MACOSX") {
        return Some("left by the macOS archiver");
    }
    if name.split('/').any(|p| p.starts_with('.')) {
        return Some("hidden file");
    }
    let base = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    if matches!(base.as_str(), "thumbs.db" | "desktop.ini") {
        return Some("left by Windows");
    }
    let (stem, extension) = split_extension(&base);
    let notice = ["readme", "license", "licence", "notice", "copying", "changelog"].contains(&stem);
    if notice && matches!(extension, "" | "txt" | "md" | "rst") {
        return Some("a notice, not data");
    }
    None
}

/// `a/b.tar.gz` → (`a/b.tar`, `gz`). A leading dot starts no extension.
pub(super) fn split_extension(name: &str) -> (&str, &str) {
    let base_at = name.rfind('/').map_or(0, |i| i + 1);
    match name[base_at..].rfind('.') {
        Some(dot) if dot > 0 => (&name[..base_at + dot], &name[base_at + dot + 1..]),
        _ => (name, ""),
    }
}

/// A name as it may be shown: control characters and the like escaped, at most 300 characters.
pub(super) fn shown(raw: &[u8]) -> String {
    let text = String::from_utf8_lossy(raw);
    let mut out: String = text
        .chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .take(300)
        .collect();
    if out.is_empty() {
        out.push_str("(no name)");
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[test]
    fn names_that_escape_or_confuse_are_refused_with_their_own_code() {
        for (name, code) in [
            ("../x.png", "entry.path_traversal"),
            ("a/../../x.png", "entry.path_traversal"),
            ("/etc/passwd", "entry.absolute_path"),
            ("C:/x.png", "entry.absolute_path"),
            ("c:x.png", "entry.absolute_path"),
            ("..\\x.png", "entry.backslash_in_name"),
            ("a\0.png", "entry.nul_in_name"),
            ("a\n.png", "entry.control_in_name"),
            ("NUL.png", "entry.device_name"),
            ("a/com1.txt", "entry.device_name"),
        ] {
            assert_eq!(checked(name).unwrap_err().0, code, "{name:?}");
        }
        assert_eq!(
            checked(&"x".repeat(300)).unwrap_err().0,
            "entry.name_too_long",
            "a component of 300 bytes"
        );
    }

    #[test]
    fn plain_names_pass_in_their_shortest_form() {
        assert_eq!(checked("./a//b.png").unwrap(), "a/b.png");
        assert_eq!(checked("a/").unwrap(), "a");
        assert_eq!(checked("..a/b...png").unwrap(), "..a/b...png");
        assert_eq!(checked("./").unwrap(), "");
    }

    #[test]
    fn names_equal_on_some_system_fold_together() {
        assert_eq!(fold("A.PNG"), fold("a.png"));
        assert_eq!(fold("e\u{301}.png"), fold("\u{e9}.png"));
        assert_ne!(fold("a.png"), fold("b.png"));
    }

    #[test]
    fn leftovers_and_notices_are_ignored_but_pictures_named_readme_are_not() {
        for name in [
            "__MACOSX/a.png",
            "x/.DS_Store",
            "._a.png",
            "README.md",
            "d/LICENSE",
            "Thumbs.db",
        ] {
            assert!(ignored(name).is_some(), "{name}");
        }
        for name in ["readme.png", "a.png", "licenses/a.txt"] {
            assert!(ignored(name).is_none(), "{name}");
        }
    }

    #[test]
    fn the_extension_is_what_follows_the_last_dot_of_the_last_part() {
        assert_eq!(split_extension("a.b/c"), ("a.b/c", ""));
        assert_eq!(split_extension("a.b/c.d.png"), ("a.b/c.d", "png"));
        assert_eq!(split_extension("a/.hidden"), ("a/.hidden", ""));
    }
}
