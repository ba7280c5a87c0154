//! Dotted keys such as `sft.optimizer.lr` and `scores[geneval].overall`.
//!
//! Knows their spelling only: dots inside brackets or double quotes do not separate.

/// Returns the position of the first dot that separates.
pub fn first_dot(text: &str) -> Option<usize> {
    let (mut depth, mut quoted) = (0usize, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => depth += 1,
            ']' if !quoted => depth = depth.saturating_sub(1),
            '.' if !quoted && depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

/// Splits at the dots that separate; quotes around a part are dropped.
pub fn split(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = first_dot(rest) {
        parts.push(unquoted(&rest[..at]));
        rest = &rest[at + 1..];
    }
    parts.push(unquoted(rest));
    parts
}

fn unquoted(part: &str) -> String {
    let part = part.trim();
    part.strip_prefix('"').and_then(|p| p.strip_suffix('"')).unwrap_or(part).to_owned()
}

/// Appends a part to a dotted key.
pub fn join(key: &str, part: &str) -> String {
    if key.is_empty() { part.to_owned() } else { format!("{key}.{part}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_in_brackets_and_quotes_do_not_separate() {
        assert_eq!(split("sft.optimizer.lr"), ["sft", "optimizer", "lr"]);
        assert_eq!(split("scores[v1.5].overall"), ["scores[v1.5]", "overall"]);
        assert_eq!(split(r#"mix.members."a.b".weight"#), ["mix", "members", "a.b", "weight"]);
        assert_eq!(split("sft"), ["sft"]);
    }
}
