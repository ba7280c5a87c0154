//! How far a job is and how fast it goes, folded from what its worker says. Used by progress and `status`.

use std::collections::{BTreeMap, VecDeque};

use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use serde::Serialize;

use super::format::{duration, number};

/// Steps over which the rate is taken; a first slow step is forgotten soon.
const WINDOW: usize = 32;

/// Position and speed of a job.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Pace {
    /// Steps done.
    pub step: u64,
    /// Steps in all; 0 until the worker says.
    pub total: u64,
    /// What a step is.
    pub unit: String,
    /// Newest value of each metric.
    pub metrics: BTreeMap<String, f64>,
    /// Step from which an earlier attempt's work goes on.
    pub resumed_step: Option<u64>,
    /// Newest checkpoint.
    pub checkpoint_step: Option<u64>,
    /// Time of the newest event, milliseconds since 1970.
    pub updated_ms: u64,
    #[serde(skip)]
    window: VecDeque<(u64, u64)>,
}

impl Pace {
    /// Takes in what the worker said.
    pub fn take(&mut self, event: &WorkerEvent) {
        self.updated_ms = event.ts_ms;
        match &event.event {
            WorkerEventKind::Started { .. } => self.window.clear(),
            WorkerEventKind::Resumed { step, .. } => {
                self.resumed_step = Some(*step);
                self.step = *step;
                self.window.clear();
            }
            WorkerEventKind::Progress { step, total, unit } => {
                self.step = *step;
                self.total = *total;
                self.unit.clone_from(unit);
                self.window.push_back((event.ts_ms, *step));
                if self.window.len() > WINDOW {
                    self.window.pop_front();
                }
            }
            WorkerEventKind::Metrics { values, .. } => {
                self.metrics.extend(values.iter().map(|(name, value)| (name.clone(), *value)));
            }
            WorkerEventKind::Checkpoint { step, .. } => self.checkpoint_step = Some(*step),
            WorkerEventKind::Warning { .. } | WorkerEventKind::Note { .. } => {}
        }
    }

    /// Returns steps per second, once two positions are known.
    pub fn rate(&self) -> Option<f64> {
        let (&(first_ms, first), &(last_ms, last)) = (self.window.front()?, self.window.back()?);
        let seconds = last_ms.saturating_sub(first_ms) as f64 / 1000.0;
        (seconds > 0.0 && last > first).then(|| (last - first) as f64 / seconds)
    }

    /// Returns the seconds left at this rate.
    pub fn eta_seconds(&self) -> Option<f64> {
        (self.total > 0).then_some(())?;
        Some(self.total.saturating_sub(self.step) as f64 / self.rate()?)
    }

    /// Returns the numbers worth a glance: a loss and a reward, whichever the job has.
    pub fn headline(&self) -> Vec<(&str, f64)> {
        let find = |word: &str| self.metrics.iter().find(|(name, _)| name.ends_with(word));
        let found = [find("/loss"), find("/reward")].into_iter().flatten();
        found.map(|(name, value)| (name.rsplit('/').next().unwrap_or(name), *value)).collect()
    }

    /// Returns loss, reward and rate in one line, without position and time left.
    pub fn numbers(&self) -> String {
        let mut parts: Vec<String> =
            self.headline().into_iter().map(|(name, value)| format!("{name} {}", number(value))).collect();
        parts.extend(self.rate().map(|rate| format!("{rate:.1} {}/s", self.unit)));
        parts.join("  ")
    }

    /// Returns everything in one line.
    pub fn line(&self) -> String {
        let mut parts = Vec::new();
        if self.total > 0 {
            parts.push(format!("{} {}/{}", self.unit, self.step, self.total));
        }
        parts.push(self.numbers());
        parts.extend(self.eta_seconds().map(|seconds| format!("{} left", duration(seconds))));
        parts.retain(|part| !part.is_empty());
        parts.join("  ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(ts_ms: u64, step: u64) -> WorkerEvent {
        WorkerEvent { ts_ms, event: WorkerEventKind::Progress { step, total: 100, unit: "iterations".into() } }
    }

    #[test]
    fn rate_and_time_left_come_from_recent_steps() {
        let mut pace = Pace::default();
        pace.take(&progress(0, 0));
        assert_eq!(pace.line(), "iterations 0/100");
        pace.take(&progress(2000, 10));
        let values = BTreeMap::from([("train/loss".to_owned(), 0.5), ("train/lr".to_owned(), 1e-4)]);
        pace.take(&WorkerEvent { ts_ms: 2000, event: WorkerEventKind::Metrics { step: 10, values } });
        assert_eq!(pace.line(), "iterations 10/100  loss 0.5000  5.0 iterations/s  18.0 s left");
    }

    #[test]
    fn a_resumed_job_does_not_count_earlier_steps_as_speed() {
        let mut pace = Pace::default();
        pace.take(&progress(0, 1));
        let resumed = WorkerEventKind::Resumed { step: 50, checkpoint: "c".into() };
        pace.take(&WorkerEvent { ts_ms: 10, event: resumed });
        pace.take(&progress(1000, 51));
        assert_eq!(pace.rate(), None);
        pace.take(&progress(2000, 52));
        assert_eq!(pace.rate(), Some(1.0));
    }
}
