//! HTML and SVG by construction: elements whose text and attributes are escaped because there is no other way in.
//!
//! Knows no report. Only [`Markup::raw`] takes text as it is, and it takes nothing but constants of this program.

use std::fmt::{self, Display, Write};

/// Finished markup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Markup(String);

impl Markup {
    /// Returns a constant of this program as it is.
    pub fn raw(text: &'static str) -> Self {
        Self(text.to_owned())
    }

    /// Returns text, escaped.
    pub fn text(text: impl Display) -> Self {
        let mut markup = String::new();
        push_escaped(&mut markup, text);
        Self(markup)
    }

    /// Returns pieces one after the other.
    pub fn join<M: Into<Self>>(pieces: impl IntoIterator<Item = M>) -> Self {
        let mut all = Self::default();
        pieces.into_iter().for_each(|piece| all.push(piece));
        all
    }

    /// Appends a piece.
    pub fn push(&mut self, piece: impl Into<Self>) {
        self.0.push_str(&piece.into().0);
    }

    /// Returns true when there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Markup {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl Display for Markup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An element that is being filled. A page holds a hundred thousand, so it is one text from the start.
#[derive(Debug, Clone)]
pub struct Element {
    tag: &'static str,
    /// All of it but its end tag.
    text: String,
    /// Where its attributes end.
    head: usize,
}

/// Elements of HTML that have neither body nor end.
const VOID: [&str; 5] = ["img", "meta", "br", "hr", "col"];

/// Elements within a line: white space after them would be seen.
const INLINE: [&str; 6] = ["a", "span", "code", "b", "strong", "summary"];

/// Returns an empty element.
pub fn el(tag: &'static str) -> Element {
    Element { tag, text: format!("<{tag}>"), head: 1 + tag.len() }
}

impl Element {
    /// Adds an attribute.
    pub fn attr(mut self, name: &'static str, value: impl Display) -> Self {
        let body = self.text.split_off(self.head);
        self.text.extend([" ", name, "=\""]);
        push_escaped(&mut self.text, value);
        self.text.push('"');
        self.head = self.text.len();
        self.text.push_str(&body);
        self
    }

    /// Adds the attribute `class`.
    pub fn class(self, names: impl Display) -> Self {
        self.attr("class", names)
    }

    /// Appends text.
    pub fn text(mut self, text: impl Display) -> Self {
        push_escaped(&mut self.text, text);
        self
    }

    /// Appends a piece.
    pub fn add(mut self, piece: impl Into<Markup>) -> Self {
        self.text.push_str(&piece.into().0);
        self
    }

    /// Appends pieces one after the other.
    pub fn add_all<M: Into<Markup>>(mut self, pieces: impl IntoIterator<Item = M>) -> Self {
        let pieces: Vec<Markup> = pieces.into_iter().map(Into::into).collect();
        // Megabytes at the end of a page: room for all of them is found once.
        self.text.reserve(pieces.iter().map(|piece| piece.0.len()).sum());
        self.text.extend(pieces.iter().map(|piece| piece.0.as_str()));
        self
    }
}

impl From<Element> for Markup {
    fn from(element: Element) -> Self {
        let Element { tag, mut text, .. } = element;
        if !VOID.contains(&tag) {
            text.extend(["</", tag, if INLINE.contains(&tag) { ">" } else { ">\n" }]);
        }
        Self(text)
    }
}

/// A table under construction: its header cells name their scope, and it scrolls within the page when it is wide.
#[derive(Debug, Clone)]
pub struct Table {
    caption: Markup,
    head: Markup,
    rows: Markup,
    class: &'static str,
}

impl Table {
    /// Returns a table without rows.
    pub fn new<M: Into<Markup>>(class: &'static str, columns: impl IntoIterator<Item = M>) -> Self {
        let cells = columns.into_iter().map(|column| el("th").attr("scope", "col").add(column));
        Self { caption: Markup::default(), head: el("tr").add_all(cells).into(), rows: Markup::default(), class }
    }

    /// Sets the caption, which says what the table shows.
    pub fn caption(mut self, text: impl Display) -> Self {
        self.caption = el("caption").text(text).into();
        self
    }

    /// Appends a row whose first cell names it.
    pub fn row<M: Into<Markup>>(&mut self, name: impl Into<Markup>, cells: impl IntoIterator<Item = M>) {
        let cells = cells.into_iter().map(|cell| el("td").add(cell));
        self.rows.push(el("tr").add(el("th").attr("scope", "row").add(name)).add_all(cells));
    }
}

impl From<Table> for Markup {
    fn from(table: Table) -> Self {
        let inner = el("table").class(table.class).add(table.caption);
        let inner = inner.add(el("thead").add(table.head)).add(el("tbody").add(table.rows));
        // Focusable, so that a keyboard can scroll it.
        el("div").class("scroll").attr("tabindex", 0).add(inner).into()
    }
}

/// Returns a part that is folded away behind a line of text.
pub fn details(summary: impl Into<Markup>, body: impl Into<Markup>) -> Element {
    el("details").add(el("summary").add(summary)).add(el("div").class("folded").add(body))
}

/// Appends text so that it means itself in a body and in a quoted attribute.
fn push_escaped(markup: &mut String, text: impl Display) {
    // Writing to a string does not fail.
    let _ = write!(Escaping(markup), "{text}");
}

/// Escapes what is written to it.
struct Escaping<'a>(&'a mut String);

impl Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            let instead = match c {
                '&' => "&amp;",
                '<' => "&lt;",
                '>' => "&gt;",
                '"' => "&quot;",
                '\'' => "&#39;",
                // Control characters are no part of HTML; logs hold them.
                c if c.is_control() && !matches!(c, '\n' | '\t') => "\u{fffd}",
                _ => continue,
            };
            self.0.extend([&text[plain..at], instead]);
            plain = at + c.len_utf8();
        }
        self.0.push_str(&text[plain..]);
        Ok(())
    }
}

/// Returns an identifier made of plain characters, the same for the same name.
pub fn anchor(prefix: &str, name: &str) -> String {
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    // Names that differ only in other characters must not meet.
    if plain == name { format!("{prefix}-{plain}") } else { format!("{prefix}-{plain}-{}", short_hash(name)) }
}

fn short_hash(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..4].to_owned()
}

/// Returns bytes as a `data:` address.
pub fn data_url(mime: &str, bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut url = format!("data:{mime};base64,");
    for group in bytes.chunks(3) {
        let value = (0..3).fold(0u32, |value, i| value << 8 | u32::from(group.get(i).copied().unwrap_or(0)));
        for digit in 0..4 {
            let index = value >> (18 - 6 * digit) & 63;
            url.push(if digit <= group.len() { DIGITS[index as usize] as char } else { '=' });
        }
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_attributes_are_escaped() {
        let element = el("a").attr("href", "x\" onclick='y'").text("<b> & \u{1b}[1m");
        assert_eq!(
            Markup::from(element).to_string().trim_end(),
            "<a href=\"x&quot; onclick=&#39;y&#39;\">&lt;b&gt; &amp; \u{fffd}[1m</a>"
        );
    }

    #[test]
    fn an_attribute_may_come_after_the_body() {
        let element = el("p").class("a").text("body").attr("id", "b").add(el("br"));
        assert_eq!(Markup::from(element).to_string(), "<p class=\"a\" id=\"b\">body<br></p>\n");
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (plain, coded) in cases {
            assert_eq!(data_url("t", plain.as_bytes()), format!("data:t;base64,{coded}"));
        }
        assert!(data_url("t", &[0xfb, 0xff]).ends_with(",+/8="));
    }

    #[test]
    fn names_that_look_alike_have_anchors_of_their_own() {
        assert_eq!(anchor("node", "sft"), "node-sft");
        assert_ne!(anchor("node", "a[b]"), anchor("node", "a(b)"));
    }
}
