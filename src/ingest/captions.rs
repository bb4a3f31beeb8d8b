//! Captions: sidecar text, and tables of them (`metadata.jsonl`, `metadata.csv`).
//!
//! Pure, but for the names of codes. Called by [`super::pairing`].

use serde_json::Value;

/// A caption's fault: code and sentence.
pub(super) type Fault = (&'static str, String);

/// A caption, and what to say about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Caption {
    pub(super) text: String,
    pub(super) warning: Option<(&'static str, String)>,
}

/// Text of an upload: UTF-8, with or without a byte order mark.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str, Fault> {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(("caption.not_utf8", "the text is UTF-16; save it as UTF-8".to_owned()));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        (
            "caption.not_utf8",
            format!("the text is not UTF-8 (at byte {at}); save it as UTF-8"),
        )
    })
}

/// Brings one caption into one line and checks it.
pub(super) fn caption(text: &str, max_chars: usize) -> Result<Caption, Fault> {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let text = lines.join(" ");
    if text.is_empty() {
        return Err(("caption.empty", "the caption is empty".to_owned()));
    }
    if let Some(c) = text.chars().find(|c| c.is_control() && *c != '\t') {
        return Err((
            "caption.control_characters",
            format!("the caption holds the control character {}", c.escape_default()),
        ));
    }
    let n = text.chars().count();
    if n > max_chars {
        return Err((
            "caption.too_long",
            format!("the caption has {n} characters; {max_chars} are allowed"),
        ));
    }
    let warning = (lines.len() > 1).then(|| {
        let detail = format!("{} lines were joined to one caption", lines.len());
        ("caption.several_lines", detail)
    });
    Ok(Caption { text, warning })
}

/// One row of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// From 1, as an editor counts.
    pub(super) line: u64,
    pub(super) file_name: String,
    pub(super) text: String,
    /// Overrides what the folder says.
    pub(super) repeats: Option<u32>,
    /// Overrides what the folder says.
    pub(super) is_reg: Option<bool>,
}

/// Most times that an epoch shows a picture.
pub(super) const MAX_REPEATS: u32 = 10_000;

fn repeats(text: &str) -> Option<u32> {
    text.trim().parse().ok().filter(|n| (1..=MAX_REPEATS).contains(n))
}

/// Reads `metadata.jsonl`: one object a line, with `file_name` and `text`, and perhaps `repeats` (1 to 10000) and `is_reg`
/// (true for regularisation images). Faults name their lines.
pub(super) fn jsonl(text: &str) -> (Vec<Row>, Vec<Fault>) {
    let mut rows = Vec::new();
    let mut faults = Vec::new();
    for (line, content) in (1u64..).zip(text.lines()) {
        if content.trim().is_empty() {
            continue;
        }
        match serde_json::from_str::<Value>(content) {
            Ok(Value::Object(mut object)) => match (object.remove("file_name"), object.remove("text")) {
                (Some(Value::String(file_name)), Some(Value::String(text))) => {
                    let (times, is_reg) = (object.remove("repeats"), object.remove("is_reg"));
                    let row = Row {
                        line,
                        file_name,
                        text,
                        repeats: times.as_ref().and_then(|v| repeats(&v.to_string())),
                        is_reg: is_reg.as_ref().and_then(Value::as_bool),
                    };
                    if times.is_some() && row.repeats.is_none() {
                        faults.push(row_fault(line, "`repeats` must be a whole number from 1 to 10000"));
                    } else if is_reg.is_some() && row.is_reg.is_none() {
                        faults.push(row_fault(line, "`is_reg` must be true or false"));
                    } else {
                        rows.push(row);
                    }
                }
                (None, _) => faults.push(row_fault(line, "has no `file_name`")),
                (_, None) => faults.push(row_fault(line, "has no `text`")),
                _ => faults.push(row_fault(line, "`file_name` and `text` must be strings")),
            },
            Ok(_) => faults.push(row_fault(line, "is not a JSON object")),
            Err(e) => faults.push(row_fault(line, &format!("is not JSON (column {})", e.column()))),
        }
    }
    (rows, faults)
}

/// Reads `metadata.csv`: a header with `file_name` and `text`, perhaps `repeats` and `is_reg`; other columns are left
/// alone, and an empty field says nothing.
pub(super) fn csv(text: &str) -> (Vec<Row>, Vec<Fault>) {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let headers = match reader.headers() {
        Ok(headers) => headers.clone(),
        Err(_) => return (Vec::new(), vec![row_fault(1, "is not CSV")]),
    };
    let column = |name: &str| headers.iter().position(|h| h.trim() == name);
    let (Some(file_name), Some(caption)) = (column("file_name"), column("text")) else {
        return (
            Vec::new(),
            vec![row_fault(1, "must name the columns `file_name` and `text`")],
        );
    };
    let (repeats_at, is_reg_at) = (column("repeats"), column("is_reg"));
    let mut rows = Vec::new();
    let mut faults = Vec::new();
    for record in reader.records() {
        match record {
            Ok(record) => {
                let line = record.position().map_or(0, csv::Position::line);
                match (record.get(file_name), record.get(caption)) {
                    _ if record.len() != headers.len() => {
                        let what = format!("has {} fields instead of {}", record.len(), headers.len());
                        faults.push(row_fault(line, &what));
                    }
                    (Some(file_name), Some(text)) => {
                        let field = |at: Option<usize>| {
                            let text = at.and_then(|i| record.get(i)).map_or("", str::trim);
                            (!text.is_empty()).then_some(text)
                        };
                        let (times, is_reg) = (field(repeats_at), field(is_reg_at));
                        let row = Row {
                            line,
                            file_name: file_name.to_owned(),
                            text: text.to_owned(),
                            repeats: times.and_then(repeats),
                            is_reg: is_reg.and_then(|text| text.to_ascii_lowercase().parse().ok()),
                        };
                        if times.is_some() && row.repeats.is_none() {
                            faults.push(row_fault(line, "`repeats` must be a whole number from 1 to 10000"));
                        } else if is_reg.is_some() && row.is_reg.is_none() {
                            faults.push(row_fault(line, "`is_reg` must be true or false"));
                        } else {
                            rows.push(row);
                        }
                    }
                    _ => faults.push(row_fault(line, "lacks a field")),
                }
            }
            Err(e) => {
                let line = e.position().map_or(0, csv::Position::line);
                faults.push(row_fault(line, "is not CSV"));
            }
        }
    }
    (rows, faults)
}

fn row_fault(line: u64, what: &str) -> Fault {
    ("metadata.bad_row", format!("line {line} {what}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[test]
    fn a_byte_order_mark_and_crlf_are_not_part_of_the_caption() {
        let text = utf8(b"\xef\xbb\xbfa red cat\r\n").unwrap();
        assert_eq!(caption(text, 100).unwrap().text, "a red cat");
    }

    #[test]
    fn several_lines_become_one_caption_with_a_warning() {
        let c = caption("a cat\n\n  in a hat \n", 100).unwrap();
        assert_eq!(c.text, "a cat in a hat");
        assert_eq!(c.warning.unwrap().0, "caption.several_lines");
    }

    #[test]
    fn every_bad_caption_has_its_code() {
        assert_eq!(utf8(b"caf\xe9").unwrap_err().0, "caption.not_utf8");
        assert_eq!(utf8(b"\xff\xfea\0").unwrap_err().0, "caption.not_utf8");
        assert_eq!(caption(" \r\n", 9).unwrap_err().0, "caption.empty");
        assert_eq!(caption("a\0b", 9).unwrap_err().0, "caption.control_characters");
        assert_eq!(caption("0123456789", 9).unwrap_err().0, "caption.too_long");
    }

    #[test]
    fn jsonl_rows_and_every_fault_are_found_with_their_lines() {
        let (rows, faults) = jsonl(
            "{\"file_name\":\"a.png\",\"text\":\"a\"}\n\n{\"text\":\"b\"}\n[1]\n{\n{\"file_name\":1,\"text\":\"x\"}",
        );
        assert_eq!(rows.len(), 1);
        let lines: Vec<_> = faults.iter().map(|f| f.1.split(' ').nth(1).unwrap()).collect();
        assert_eq!(lines, ["3", "4", "5", "6"]);
    }

    #[test]
    fn csv_with_quotes_newlines_and_extra_columns_is_read() {
        let (rows, faults) = csv("file_name,author,text\r\na.png,me,\"a, \"\"b\"\"\r\nc\"\r\nb.png,you\r\n");
        assert_eq!(rows[0].text, "a, \"b\"\r\nc");
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].1.contains("2 fields instead of 3"), "{faults:?}");
    }

    #[test]
    fn both_tables_may_say_how_often_and_what_for() {
        let (rows, faults) = jsonl(
            "{\"file_name\":\"a\",\"text\":\"t\",\"repeats\":3,\"is_reg\":true}\n{\"file_name\":\"b\",\"text\":\"t\",\"repeats\":0}",
        );
        assert_eq!((rows[0].repeats, rows[0].is_reg), (Some(3), Some(true)));
        assert!(faults[0].1.contains("line 2 `repeats`"), "{faults:?}");
        let (rows, faults) = csv("file_name,text,repeats,is_reg\na,t,2,\nb,t,,True\nc,t,x,\n");
        assert_eq!((rows[0].repeats, rows[0].is_reg), (Some(2), None));
        assert_eq!((rows[1].repeats, rows[1].is_reg), (None, Some(true)));
        assert_eq!(faults.len(), 1, "{faults:?}");
    }

    #[test]
    fn csv_without_the_needed_columns_is_refused() {
        assert!(csv("name,caption\na,b\n").1[0].1.contains("file_name"));
    }
}
