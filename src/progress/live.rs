//! Progress for terminals: a bar per running node with its position, loss, rate and time left, finished nodes above.

use std::collections::BTreeMap;
use std::time::Duration;

use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::NodeName;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::duration;
use super::pace::Pace;
use super::plain::{Teller, remark};
use super::progress::{Progress, Summary};
use crate::run::event::{NodeState, RunEvent};

const BAR: &str = "{prefix:<24!} [{bar:24}] {msg}";
const SPINNER: &str = "{prefix:<24!} {spinner} {msg}";

/// Draws bars on standard error.
#[derive(Debug)]
pub struct Live {
    bars: MultiProgress,
    running: BTreeMap<NodeName, (ProgressBar, Pace)>,
    teller: Teller,
}

impl Default for Live {
    fn default() -> Self {
        Self::new()
    }
}

impl Live {
    /// Returns progress without bars yet.
    pub fn new() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8));
        Self { bars, running: BTreeMap::new(), teller: Teller::default() }
    }

    fn say(&self, line: &str) {
        // Printing fails only when the terminal is gone.
        let _ = self.bars.println(line);
    }

    fn open_bar(&mut self, node: &NodeName) {
        let bar = self.bars.add(ProgressBar::new_spinner());
        bar.set_style(style(SPINNER));
        bar.set_prefix(node.to_string());
        bar.set_message("starts");
        bar.enable_steady_tick(Duration::from_millis(200));
        self.running.insert(node.clone(), (bar, Pace::default()));
    }
}

/// Templates are constants of this file; one that does not parse would show in the first run by hand.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Progress for Live {
    fn run_event(&mut self, ts_ms: u64, event: &RunEvent) {
        for line in self.teller.tell(ts_ms, event) {
            self.say(&line);
        }
        let RunEvent::Node { node, state, .. } = event else { return };
        match state {
            NodeState::Running { .. } => self.open_bar(node),
            NodeState::Sealing { .. } => {
                if let Some((bar, _)) = self.running.get(node) {
                    bar.set_message("sealing");
                }
            }
            _ => {
                if let Some((bar, _)) = self.running.remove(node) {
                    bar.finish_and_clear();
                    self.bars.remove(&bar);
                }
            }
        }
    }

    fn worker_event(&mut self, node: &NodeName, _attempt: u32, event: &WorkerEvent) {
        if let Some((bar, pace)) = self.running.get_mut(node) {
            let had_total = pace.total > 0;
            pace.take(event);
            if pace.total > 0 && !had_total {
                bar.disable_steady_tick();
                bar.set_style(style(BAR));
            }
        }
        if let Some(line) = remark(node, event) {
            self.say(&line);
        }
    }

    fn note(&mut self, message: &str) {
        self.say(message);
    }

    fn tick(&mut self, _now_ms: u64) {
        for (bar, pace) in self.running.values() {
            if pace.total == 0 {
                continue;
            }
            bar.set_length(pace.total);
            bar.set_position(pace.step);
            let left = pace.eta_seconds().map_or(String::new(), |seconds| format!("  {} left", duration(seconds)));
            bar.set_message(format!("{}/{}  {}{left}", pace.step, pace.total, pace.numbers()));
        }
    }

    fn summary(&mut self, summary: &Summary) {
        if let Some(line) = self.teller.flush() {
            self.say(&line);
        }
        self.running.values().for_each(|(bar, _)| bar.finish_and_clear());
        // An interrupted draw may fail; the summary below does not depend on it.
        let _ = self.bars.clear();
        summary.print();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_parse() {
        for template in [BAR, SPINNER] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
