//! Numbers, tables and foreign text in the form that people read.

use std::fmt::Write;

use unicode_width::UnicodeWidthStr;

/// A number of bytes with a binary unit: `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS.iter();
    let mut name = unit.next().unwrap_or(&"KiB");
    // 1023.95 and more would be shown as 1024.0.
    while value >= 1023.95 {
        let Some(next) = unit.next() else { break };
        (value, name) = (value / 1024.0, next);
    }
    format!("{value:.1} {name}")
}

/// Reads a number of bytes as typed: `10G`, `1.5 GiB`, `4096`. Units are binary.
pub fn size(text: &str) -> Result<u64, String> {
    let refuse = || format!("{text:?} is no size: write a number with K, M, G, T or P behind it");
    let trimmed = text.trim();
    let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "p" | "pib" => 1 << 50,
        _ => return Err(refuse()),
    };
    // In whole numbers, so that nothing is rounded.
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| refuse())?;
    let mut bytes = u128::from(whole) * u128::from(unit);
    if !fraction.is_empty() {
        let digits = u32::try_from(fraction.len()).ok().filter(|digits| *digits <= 9);
        let scale = 10u128.pow(digits.ok_or_else(refuse)?);
        let parts: u64 = fraction.parse().map_err(|_| refuse())?;
        bytes += u128::from(parts) * u128::from(unit) / scale;
    }
    u64::try_from(bytes).map_err(|_| refuse())
}

/// A time span: `0.42 s`, `3 min 5 s`, `2 h 10 min`.
pub fn duration_ms(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..10 => format!("{s}.{:02} s", ms % 1000 / 10),
        10..120 => format!("{s} s"),
        120..7200 => format!("{} min {} s", s / 60, s % 60),
        7200.. => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// A ratio of two numbers of bytes: `2.5x`; `-` where it says nothing.
pub fn ratio(raw: u64, stored: u64) -> String {
    if stored == 0 {
        return "-".to_owned();
    }
    #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
    let ratio = raw as f64 / stored as f64;
    format!("{ratio:.1}x")
}

/// A number with its noun: `1 volume`, `2 volumes`.
pub fn count(n: impl TryInto<u64>, noun: &str) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// A time of day in UTC, to the second.
pub fn time(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// Text of unknown origin without what a terminal would obey.
pub fn clean(text: &str) -> String {
    if !text.chars().any(char::is_control) {
        return text.to_owned();
    }
    let escape = |c: char| -> String {
        if c.is_control() { c.escape_default().collect() } else { c.into() }
    };
    text.chars().map(escape).collect()
}

/// A word as a shell takes it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:#@%+=,".contains(c);
    // A '#' at the beginning of a word starts a comment.
    if !word.is_empty() && word.chars().all(plain) && !word.starts_with('#') {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Which side of a column its cells lean to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows under a heading, in columns as wide as they need to be.
#[derive(Debug)]
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub fn new(columns: &[(&str, Side)]) -> Self {
        let heading = columns.iter().map(|(title, _)| (*title).to_owned()).collect();
        Self { sides: columns.iter().map(|(_, side)| *side).collect(), rows: vec![heading] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl AsRef<str>>) {
        self.rows.push(cells.into_iter().map(|cell| clean(cell.as_ref())).collect());
    }

    /// The table as text, one line for each row and for the heading.
    pub fn render(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.width()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.sides.len()).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, side), width) in row.iter().zip(&self.sides).zip(&widths) {
                // Writing to a String can't fail.
                let blank = width.saturating_sub(cell.width());
                let _ = match side {
                    Side::Left => write!(line, "{cell}{:blank$}  ", ""),
                    Side::Right => write!(line, "{:blank$}{cell}  ", ""),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Lines of `key  value`, the keys as wide as the widest.
#[derive(Debug, Default)]
pub struct Fields(Vec<(&'static str, String)>);

impl Fields {
    /// Adds a line.
    pub fn add(&mut self, key: &'static str, value: impl AsRef<str>) -> &mut Self {
        self.0.push((key, clean(value.as_ref())));
        self
    }

    /// Adds a line if there is a value.
    pub fn add_some(&mut self, key: &'static str, value: Option<impl AsRef<str>>) -> &mut Self {
        if let Some(value) = value {
            self.add(key, value);
        }
        self
    }

    /// The lines.
    pub fn render(&self) -> String {
        let width = self.0.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
        self.0.iter().fold(String::new(), |mut out, (key, value)| {
            let _ = writeln!(out, "{key:<width$}  {value}");
            out
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        let shown: Vec<String> =
            [0, 1023, 1024, 1536, 1_048_575, 1 << 30, u64::MAX].into_iter().map(bytes).collect();
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 GiB", "16384.0 PiB"]
        );
        let shown: Vec<String> =
            [5, 1_420, 11_000, 185_000, 7_800_000].into_iter().map(duration_ms).collect();
        assert_eq!(shown, ["0.00 s", "1.42 s", "11 s", "3 min 5 s", "2 h 10 min"]);
        assert_eq!((ratio(5, 2).as_str(), ratio(5, 0).as_str()), ("2.5x", "-"));
        assert_eq!((count(1u64, "run"), count(0u64, "run")), ("1 run".into(), "0 runs".into()));
    }

    #[test]
    fn sizes_as_typed() {
        let read = |text| size(text).ok();
        assert_eq!(read("4096"), Some(4096));
        assert_eq!(read("10G"), Some(10 << 30));
        assert_eq!(read("1.5 GiB"), Some(3 << 29));
        assert_eq!(read("2t"), Some(2 << 40));
        for wrong in ["", "G", "-1G", "1X", "1..5G", "99999999P", "1.5.5G", "1 G B"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_terminal_obeys_no_label() {
        assert_eq!(clean("a\u{1b}[2Jb\n"), r"a\u{1b}[2Jb\n");
        assert_eq!(clean("模型 v1"), "模型 v1");
    }

    #[test]
    fn shells_see_one_word() {
        assert_eq!(quoted("file:///a/b#c/d"), "file:///a/b#c/d");
        assert_eq!(quoted("s3://b?endpoint=http://h#c"), "'s3://b?endpoint=http://h#c'");
        assert_eq!(quoted("#e/r"), "'#e/r'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn columns() {
        let mut table =
            Table::new(&[("NAME", Side::Left), ("SIZE", Side::Right), ("X", Side::Left)]);
        table.row(["a", "1 B", ""]);
        table.row(["long name", "10 KiB", "y"]);
        assert_eq!(
            table.render(),
            "NAME         SIZE  X\na             1 B\nlong name  10 KiB  y\n"
        );
    }
}
