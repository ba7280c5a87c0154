//! How a node runs, as opposed to what it computes: retries with back-off and remedies, times, slots.
//!
//! Data only, and how its times and sizes are written. Nothing here enters a fingerprint: the same result comes of it.

use serde::{Deserialize, Serialize};

/// Pauses between the attempts of a node.
///
/// The pause before attempt `k + 1` of a run, after `k` failures, is `first_s * factor^(k - 1)` seconds, at most
/// `most_s`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backoff {
    /// Seconds before the first further attempt.
    pub first_s: f64,
    /// Each pause is this many times the one before; at least 1.
    pub factor: f64,
    /// Longest pause in seconds.
    pub most_s: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first_s: 0.5, factor: 2.0, most_s: 60.0 }
    }
}

impl Backoff {
    /// Returns the pause in milliseconds after the failure number `failures`, from 1.
    pub fn pause_ms(&self, failures: u32) -> u64 {
        let exponent = f64::from(failures.saturating_sub(1).min(64));
        let seconds = (self.first_s * self.factor.powf(exponent)).min(self.most_s);
        // A cast saturates: an endless pause is a very long one.
        (seconds.max(0.0) * 1000.0) as u64
    }
}

/// What is done about an attempt's failure, by cause, before the node counts as failed.
///
/// A remedy that is on makes its cause worth another attempt, as long as `retries` are left; one that is off makes the
/// node fail at once of that cause. Failures of reading and writing and of the worker itself are retried as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remedies {
    /// Out of memory: the next attempt computes in micro-batches of half the size and as many more of them, so that the
    /// global batch, and with it the result's definition, stays.
    pub out_of_memory: bool,
    /// A loss or gradient that is not finite: the next attempt starts from the newest checkpoint that was written before
    /// it; later ones are set aside.
    pub non_finite: bool,
    /// No progress for the node's `stall_s`: the worker is killed and the next attempt goes on from its checkpoint.
    pub stalled: bool,
    /// The worker or its node vanished without a word: the job is submitted again.
    pub lost: bool,
}

impl Default for Remedies {
    fn default() -> Self {
        Self { out_of_memory: true, non_finite: true, stalled: true, lost: true }
    }
}

/// Names of the remedies in files.
pub const REMEDIES: [&str; 4] = ["out_of_memory", "non_finite", "stalled", "lost"];

impl Remedies {
    /// Returns the switch of a name.
    pub fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "out_of_memory" => Some(&mut self.out_of_memory),
            "non_finite" => Some(&mut self.non_finite),
            "stalled" => Some(&mut self.stalled),
            "lost" => Some(&mut self.lost),
            _ => None,
        }
    }
}

/// Returns the seconds of a time such as `90`, `45s`, `2h30m`, `1.5h` or `1d`.
///
/// # Errors
/// Says how a time is written.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    let units = [("ms", 0.001), ("d", 86_400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0)];
    let wrong = || format!("`{text}` is no time: write seconds, or such as \"45s\", \"30m\", \"2h30m\" or \"1d\"");
    let mut rest = text.trim();
    let mut seconds = 0.0;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = rest[digits..].trim_start();
        let (unit, size) = units.iter().find(|(unit, _)| rest.starts_with(unit)).ok_or_else(wrong)?;
        seconds += number * size;
        rest = rest[unit.len()..].trim_start();
    }
    if seconds.is_finite() { Ok(seconds) } else { Err(wrong()) }
}

/// Returns the GiB of an amount of memory such as `16GiB` or `512MiB`.
///
/// # Errors
/// Says how an amount is written.
pub fn parse_gib(text: &str) -> Result<f64, String> {
    let wrong = || format!("`{text}` is no amount: write GiB, or such as \"16GiB\" or \"512MiB\"");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let number: f64 = text[..digits].parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(wrong)?;
    match text[digits..].trim() {
        "TiB" => Ok(number * 1024.0),
        "GiB" => Ok(number),
        "MiB" => Ok(number / 1024.0),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_people_write_them() {
        for (text, seconds) in [("45s", 45.0), ("2h30m", 9000.0), ("2h 30m", 9000.0), ("1.5h", 5400.0), ("1d", 86400.0)]
        {
            assert_eq!(parse_seconds(text), Ok(seconds), "{text}");
        }
        assert_eq!(parse_seconds("250ms"), Ok(0.25));
        for wrong in ["", "5", "h", "5x", "1.2.3s", "-5s", "2h30"] {
            assert!(parse_seconds(wrong).unwrap_err().contains("2h30m"), "{wrong}");
        }
    }

    #[test]
    fn memory_is_counted_in_gib() {
        assert_eq!(parse_gib("16GiB"), Ok(16.0));
        assert_eq!(parse_gib("512 MiB"), Ok(0.5));
        assert!(parse_gib("16GB").unwrap_err().contains("GiB"));
        assert!(parse_gib("16").is_err());
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let backoff = Backoff { first_s: 2.0, factor: 3.0, most_s: 60.0 };
        assert_eq!([1, 2, 3, 4, 5, 900].map(|k| backoff.pause_ms(k)), [2000, 6000, 18000, 54000, 60000, 60000]);
        assert_eq!(Backoff::default().pause_ms(1), 500);
    }
}
