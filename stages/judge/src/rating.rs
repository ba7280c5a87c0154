//! Ratings of an image on scales: reading the answers of a benchmark's calls, and the verdict they make.
//!
//! Knows the benchmark's call table, not who answers. Numbers are brought to 0..1 by each call's scale, so the part
//! `rating` times the benchmark's scale is the official score: WISE's `(0.7 C + 0.2 R + 0.1 A) / 2`, RISE's and
//! UniREditBench's `25 (s - 1)`, ImgEdit's mean of three.

use crate::benchmark::{AnswerFormat, Benchmark, Call};
use crate::checklist::read_score_list;
use crate::verdict::Verdict;

/// Returns the numbers of an answer, in the order of the call's criteria; nothing if one is missing or off the scale.
pub fn read(call: &Call, answer: &str) -> Option<Vec<f64>> {
    let numbers = match call.reads {
        AnswerFormat::ScoreList => read_score_list(answer, call.criteria.len())?,
        AnswerFormat::FinalScore => vec![number_after(answer, "final score")?],
        AnswerFormat::Lines => call.criteria.iter().map(|name| number_after(answer, name)).collect::<Option<_>>()?,
        AnswerFormat::YesNo => return None,
    };
    let scale = call.low as f64..=call.high as f64;
    numbers.iter().all(|number| scale.contains(number)).then_some(numbers)
}

/// Returns the number after the last `name:`, whatever the case; stars of bold print and blanks are skipped.
fn number_after(answer: &str, name: &str) -> Option<f64> {
    let answer = answer.to_lowercase();
    let at = answer.rfind(&name.to_lowercase())? + name.len();
    let rest = answer[at..].trim_start_matches([' ', '*', ':', '\u{ff1a}', '\t']);
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].trim_end_matches('.').parse().ok()
}

/// Returns the verdict from the numbers of all calls, in the benchmark's order. Nothing if the counts do not fit.
///
/// With weights, the part `rating` is the weighted mean. Without, the calls are GEdit's: `SC` and `PQ` are the
/// smallest numbers of the first and the second call, and `overall` is `sqrt(SC PQ)`.
pub fn conclude(benchmark: &Benchmark, numbers: &[Vec<f64>]) -> Option<Verdict> {
    let is_complete = benchmark.calls.len() == numbers.len()
        && benchmark.calls.iter().zip(numbers).all(|(call, numbers)| call.criteria.len() == numbers.len());
    if !is_complete || numbers.is_empty() {
        return None;
    }
    let mut verdict = Verdict { strict: true, graded: 0.0, parts: Vec::new() };
    let (mut rated, mut weights) = (0.0, 0.0);
    let mut worst = Vec::new();
    for (call, numbers) in benchmark.calls.iter().zip(numbers) {
        let share = |number: f64| (number - call.low as f64) / (call.high - call.low) as f64;
        for (i, (name, &number)) in call.criteria.iter().zip(numbers).enumerate() {
            let weight = call.weights.get(i).copied().unwrap_or(0.0);
            verdict.push(&name.to_lowercase().replace(' ', "_"), share(number), 1.0);
            verdict.strict &= number >= call.high as f64;
            rated += weight * share(number);
            weights += weight;
        }
        worst.push(numbers.iter().map(|&number| share(number)).fold(1.0, f64::min));
    }
    let graded = match worst[..] {
        [sc, pq] if weights == 0.0 => {
            verdict.push("sc", sc, 1.0);
            verdict.push("pq", pq, 1.0);
            verdict.push("overall", (sc * pq).sqrt(), 1.0);
            (sc * pq).sqrt()
        }
        _ if weights > 0.0 => {
            verdict.push("rating", rated / weights, 1.0);
            rated / weights
        }
        _ => return None,
    };
    verdict.graded = graded as f32;
    Some(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(name: &str, numbers: &[Vec<f64>]) -> (f64, bool) {
        let benchmark = Benchmark::load(name).unwrap();
        let verdict = conclude(&benchmark, numbers).unwrap();
        let (value, _) = verdict.part(&benchmark.aggregation.part).unwrap();
        (benchmark.aggregation.scale * value + benchmark.aggregation.offset, verdict.strict)
    }

    #[test]
    fn official_formulas_come_out() {
        let near = |(value, strict): (f64, bool), expected: f64, is_strict: bool| {
            assert!((value - expected).abs() < 1e-9 && strict == is_strict, "{value} {strict}, not {expected}");
        };
        near(value("wise", &[vec![1.0, 2.0, 1.0]]), (0.7 + 0.4 + 0.1) / 2.0, false);
        near(value("imgedit", &[vec![5.0, 4.0, 3.0]]), 4.0, false);
        near(value("imgedit", &[vec![5.0, 5.0, 5.0]]), 5.0, true);
        near(value("gedit", &[vec![9.0, 4.0], vec![9.0, 10.0]]), 6.0, false);
        // 0.3 * 5 + 0.5 * 3 + 0.2 * 4 = 3.8, and 25 (3.8 - 1) = 70.
        near(value("uniredit", &[vec![5.0], vec![3.0], vec![4.0]]), 70.0, false);
        near(value("rise", &[vec![5.0], vec![5.0], vec![5.0]]), 100.0, true);
        near(value("rise", &[vec![5.0], vec![4.0], vec![5.0]]), 0.0, false);
    }

    #[test]
    fn answers_are_read_as_they_come() {
        let wise = &Benchmark::load("wise").unwrap().calls[0];
        let answer = "**Consistency:** 2\nrealism: 1\nAesthetic Quality: 0.\n";
        assert_eq!(read(wise, answer), Some(vec![2.0, 1.0, 0.0]));
        assert_eq!(read(wise, "Consistency: 2\nRealism: 3\nAesthetic Quality: 0"), None, "3 is off the scale");
        assert_eq!(read(wise, "Consistency: 2"), None);
        let rise = &Benchmark::load("rise").unwrap().calls[1];
        assert_eq!(read(rise, "I first thought Final Score: 2.\nFinal Score: 4"), Some(vec![4.0]));
        let gedit = &Benchmark::load("gedit").unwrap().calls[0];
        assert_eq!(read(gedit, r#"{"score": [7, 10], "reasoning": "ok"}"#), Some(vec![7.0, 10.0]));
    }

    #[test]
    fn calls_without_an_answer_give_no_verdict() {
        let rise = Benchmark::load("rise").unwrap();
        assert_eq!(conclude(&rise, &[vec![5.0], vec![4.0]]), None);
    }
}
