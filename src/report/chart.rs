//! A line chart as inline SVG, with its numbers as a table beside it.
//!
//! Knows lines and axes, not what they mean. Colours are classes, so that one drawing serves light and dark.

use super::markup::{Markup, Table, details, el};
use super::series::{Chart, Line};
use crate::progress::format::number;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 264.0;
/// Room for labels around the plot: left, right, top, bottom.
const MARGIN: [f64; 4] = [52.0, 14.0, 12.0, 36.0];
/// Points drawn of a line; more do not show.
const MAX_POINTS: usize = 360;
/// Lines with at most this many points show each of them.
const MAX_DOTS: usize = 40;
/// Rows of the table.
const MAX_ROWS: usize = 40;

/// An axis: its ends and the values that are named on it.
#[derive(Debug, Clone, PartialEq)]
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    is_log: bool,
}

/// Returns a chart as a figure. `what` says whose numbers these are.
pub fn figure(chart: &Chart, what: &str, step_name: &str) -> Markup {
    let legend = chart.lines.iter().enumerate().map(|(index, line)| {
        let last = line.shown().last().map_or(String::new(), |(_, value)| number(*value));
        let stroke = el("path").class(format!("line l{}", index + 1)).attr("d", "M1 5L25 5");
        let key = el("svg").class("key").attr("viewBox", "0 0 26 10").attr("aria-hidden", "true").add(stroke);
        el("li").add(key).text(&line.name).text(" ").add(el("b").text(last))
    });
    let scale = if chart.is_log { el("span").class("muted").text(" logarithmic") } else { el("span") };
    el("figure")
        .class("chart")
        .add(el("figcaption").add(el("strong").text(&chart.title)).add(scale))
        .add(el("ul").class("legend").add_all(legend))
        .add(svg(chart, what, step_name))
        .add(details("Data", table(chart, step_name)))
        .into()
}

fn svg(chart: &Chart, what: &str, step_name: &str) -> Markup {
    let points = || chart.lines.iter().flat_map(|line| line.points.iter());
    let x = Axis::linear(points().map(|(step, _)| *step), 6);
    let shown = || {
        // Raw values stretch the axis only as far as most of them reach: one early spike must not flatten the rest.
        let all = chart.lines.iter().flat_map(|line| trimmed(&line.points));
        all.chain(chart.lines.iter().flat_map(Line::shown).map(|(_, value)| *value).collect::<Vec<_>>())
    };
    let y = if chart.is_log { Axis::logarithmic(shown()) } else { Axis::linear(shown(), 5) };
    let (left, right, top, bottom) = (MARGIN[0], WIDTH - MARGIN[1], MARGIN[2], HEIGHT - MARGIN[3]);
    let place = |&(step, value): &(f64, f64)| {
        let value = bottom - y.share(value).clamp(-0.02, 1.02) * (bottom - top);
        (left + x.share(step) * (right - left), value)
    };
    let mut drawing = Markup::default();
    for tick in &y.ticks {
        let at = bottom - y.share(*tick) * (bottom - top);
        drawing.push(line("grid", left, at, right, at));
        drawing.push(label(left - 8.0, at + 4.0, "end", &tick_text(*tick, &y.ticks)));
    }
    for tick in &x.ticks {
        let at = left + x.share(*tick) * (right - left);
        drawing.push(line("axis", at, bottom, at, bottom + 4.0));
        drawing.push(label(at, bottom + 17.0, "middle", &tick_text(*tick, &x.ticks)));
    }
    drawing.push(line("axis", left, bottom, right, bottom));
    drawing.push(label((left + right) / 2.0, HEIGHT - 4.0, "middle", step_name));
    for (index, line) in chart.lines.iter().enumerate() {
        if !line.smooth.is_empty() {
            drawing.push(path(&format!("raw l{}", index + 1), &line.points, place));
        }
    }
    for (index, line) in chart.lines.iter().enumerate() {
        drawing.push(path(&format!("line l{}", index + 1), line.shown(), place));
        if line.shown().len() <= MAX_DOTS {
            let dots = line.shown().iter().map(|point| {
                let (x, y) = place(point);
                let title = el("title").text(format!("{} at {}: {}", line.name, point.0, number(point.1)));
                el("circle")
                    .class(format!("dot s{}", index + 1))
                    .attr("cx", px(x))
                    .attr("cy", px(y))
                    .attr("r", 2.6)
                    .add(title)
            });
            drawing.push(Markup::join(dots));
        }
    }
    el("svg")
        .attr("viewBox", format!("0 0 {WIDTH} {HEIGHT}"))
        .attr("role", "img")
        .add(el("title").text(format!("{}: {what}", chart.title)))
        .add(el("desc").text(description(chart)))
        .add(drawing)
        .into()
}

/// Says in words what a look at the chart tells.
fn description(chart: &Chart) -> String {
    let course = |line: &Line| {
        let (first, last) = (line.shown().first()?, line.shown().last()?);
        let steps = format!("from step {} to {}", first.0, last.0);
        Some(format!("{} goes from {} to {} {steps}.", line.name, number(first.1), number(last.1)))
    };
    chart.lines.iter().filter_map(course).collect::<Vec<_>>().join(" ")
}

fn table(chart: &Chart, step_name: &str) -> Markup {
    let mut steps: Vec<f64> = chart.lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)).collect();
    steps.sort_by(f64::total_cmp);
    steps.dedup();
    let chosen: Vec<f64> = evenly(steps.len(), MAX_ROWS).map(|index| steps[index]).collect();
    let columns = std::iter::once(step_name).chain(chart.lines.iter().map(|line| line.name.as_str()));
    let caption = if chosen.len() < steps.len() {
        format!("{} of {} logged steps, values as logged", chosen.len(), steps.len())
    } else {
        "Values as logged".to_owned()
    };
    let mut table = Table::new("numbers", columns.map(Markup::text)).caption(caption);
    for step in chosen {
        let value = |line: &Line| {
            let point = line.points.iter().find(|point| point.0 == step);
            Markup::text(point.map_or(String::new(), |point| number(point.1)))
        };
        table.row(Markup::text(step), chart.lines.iter().map(value));
    }
    table.into()
}

/// Returns the values without the most extreme fiftieth at either end.
fn trimmed(points: &[(f64, f64)]) -> Vec<f64> {
    let mut values: Vec<f64> = points.iter().map(|point| point.1).collect();
    values.sort_by(f64::total_cmp);
    let cut = values.len() / 50;
    values[cut..values.len() - cut].to_vec()
}

/// Returns at most `max` indices below `len`, evenly spaced, with the first and the last.
fn evenly(len: usize, max: usize) -> impl Iterator<Item = usize> {
    let num = len.min(max);
    (0..num).map(move |i| if num < 2 { i } else { i * (len - 1) / (num - 1) })
}

fn path(class: &str, points: &[(f64, f64)], place: impl Fn(&(f64, f64)) -> (f64, f64)) -> Markup {
    let mut data = String::new();
    for index in evenly(points.len(), MAX_POINTS) {
        let (x, y) = place(&points[index]);
        data.push_str(&format!("{}{} {}", if data.is_empty() { "M" } else { "L" }, px(x), px(y)));
    }
    el("path").class(class).attr("d", data).into()
}

fn line(class: &str, x1: f64, y1: f64, x2: f64, y2: f64) -> Markup {
    el("line").class(class).attr("x1", px(x1)).attr("y1", px(y1)).attr("x2", px(x2)).attr("y2", px(y2)).into()
}

fn label(x: f64, y: f64, anchor: &str, text: &str) -> Markup {
    el("text").class("tick").attr("x", px(x)).attr("y", px(y)).attr("text-anchor", anchor).text(text).into()
}

/// Returns a coordinate with the digits that a screen can show.
pub fn px(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or_else(|| text.clone(), str::to_owned)
}

/// Returns a tick's value with as many decimals as tell neighbours apart.
fn tick_text(value: f64, ticks: &[f64]) -> String {
    let step = ticks.windows(2).map(|pair| (pair[1] - pair[0]).abs()).fold(f64::INFINITY, f64::min);
    if value == 0.0 {
        return "0".into();
    }
    let step = if step.is_finite() { step } else { value.abs() };
    if !(1e-4..1e6).contains(&value.abs()) {
        return format!("{value:.0e}");
    }
    if value.abs() >= 10_000.0 {
        return format!("{}k", px(value / 1000.0));
    }
    let decimals = (-step.log10()).ceil().clamp(0.0, 6.0) as usize;
    format!("{value:.decimals$}")
}

impl Axis {
    /// Returns an axis with round ticks that holds all values.
    fn linear(values: impl Iterator<Item = f64>, num_ticks: usize) -> Self {
        let (mut low, mut high) = extent(values);
        if low == high {
            let room = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            (low, high) = (low - room, high + room);
        }
        let step = round_step((high - low) / num_ticks as f64);
        let first = (low / step - 1e-9).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        Self { low, high, ticks: (first..=last).map(|tick| tick as f64 * step).collect(), is_log: false }
    }

    /// Returns a logarithmic axis that holds all values, which must be positive.
    fn logarithmic(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = extent(values.filter(|value| *value > 0.0));
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let mantissas: &[f64] = if last - first > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let ticks = (first..=last).flat_map(|power| mantissas.iter().map(move |mantissa| mantissa * 10f64.powi(power)));
        let ticks = ticks.filter(|tick| (low * 0.999..=high * 1.001).contains(tick)).collect();
        Self { low, high, ticks, is_log: true }
    }

    /// Returns where a value lies between the ends, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        if self.is_log {
            let value = value.max(self.low * 1e-3);
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }
}

fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low.is_finite() { (low, high) } else { (0.0, 1.0) }
}

/// Returns the smallest of 1, 2 and 5 times a power of ten that is no smaller than `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let mantissa = step / power;
    let round = [1.0, 2.0, 5.0].into_iter().find(|round| mantissa <= round * (1.0 + 1e-9)).unwrap_or(10.0);
    round * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_lie_within_the_axis() {
        let axis = Axis::linear([0.0, 237.0].into_iter(), 6);
        assert_eq!(axis.ticks, [0.0, 50.0, 100.0, 150.0, 200.0]);
        let axis = Axis::linear([0.031, 0.052].into_iter(), 5);
        let texts: Vec<String> = axis.ticks.iter().map(|tick| tick_text(*tick, &axis.ticks)).collect();
        assert_eq!(texts, ["0.035", "0.040", "0.045", "0.050"]);
        let axis = Axis::logarithmic([0.02, 3.0].into_iter());
        assert_eq!(axis.ticks.len(), 7);
        assert!((axis.share(0.02), axis.share(3.0)) == (0.0, 1.0));
    }

    #[test]
    fn a_flat_line_has_an_axis() {
        let axis = Axis::linear([2.0, 2.0].into_iter(), 5);
        assert!(axis.low < 2.0 && axis.high > 2.0 && !axis.ticks.is_empty());
    }

    #[test]
    fn indices_are_spread_over_the_whole() {
        assert_eq!(evenly(10, 4).collect::<Vec<_>>(), [0, 3, 6, 9]);
        assert_eq!(evenly(2, 4).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(evenly(0, 4).count(), 0);
    }
}
