//! `score`: a judge looks at every image of a benchmark; the benchmark's own formula makes the table.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::eval::{ANSWERS_FILE, IMAGES_FILE, ImageRecord, JudgeSettings, SCORES_FILE, ScoreSettings};
use deepgen_judge::benchmark::Benchmark;
use deepgen_judge::cached::CachedJudge;
use deepgen_judge::judge::Judge;
use deepgen_judge::scoring::{self, Subject};
use deepgen_judge::table::{Outcome, score_table};
use image::RgbImage;
use serde_json::json;

use crate::error::{JobError, JobResult, OrFail};
use crate::files;
use crate::job::{JobContext, JobEnd, JobReport};

/// Folder beside the attempts that keeps the answers of chat judges, so that no attempt asks a question again.
const ANSWER_CACHE: &str = "answers-cache";

/// Writes the score table and the raw answers.
///
/// # Errors
/// When an image cannot be read, the judge fails, or scoring is left to others.
pub fn run(settings: &ScoreSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let folder = context.input_path("images", ArtifactKind::Images)?;
    let benchmark = Benchmark::load(&settings.benchmark).or_input(|| "`benchmark`")?;
    let judge = scoring::judge(&settings.judge).map_err(JobError::input)?.ok_or_else(|| {
        JobError::input(format!(
            "the judge of {} is `external`: run the benchmark's own scorer on {}, or set `judge` to `http` or `rule`",
            settings.benchmark,
            folder.display()
        ))
    })?;
    let (judge, name, workers): (Box<dyn Judge>, &str, usize) = match &settings.judge {
        JudgeSettings::Http { workers, model, .. } => {
            (Box::new(CachedJudge::new(judge, context.dir.with_file_name(ANSWER_CACHE))), model, *workers)
        }
        JudgeSettings::Rule { .. } | JudgeSettings::External => {
            (judge, "the exact reader of the shapes world", context.spec.threads.max(1))
        }
    };
    let records = read_records(&folder)?;
    let subjects: Vec<Subject> = records.iter().map(|record| subject(&folder, record)).collect::<JobResult<_>>()?;
    let scored = scoring::score_all(&benchmark, judge.as_ref(), &subjects, workers).or_input(|| "judge an image")?;
    let outcomes: Vec<Outcome> = records
        .iter()
        .zip(&scored)
        .map(|(record, scored)| Outcome {
            item: record.item.clone(),
            tag: record.tag.clone(),
            verdict: scored.verdict.clone(),
        })
        .collect();
    let table = score_table(&benchmark, name, &outcomes, settings.resamples).or_input(|| "the table")?;
    let lines: Vec<String> = records
        .iter()
        .zip(&scored)
        .map(|(record, scored)| {
            let verdict = scored.verdict.as_ref();
            json!({
                "item": record.item, "copy": record.copy, "file": record.file,
                "strict": verdict.map(|verdict| verdict.strict), "graded": verdict.map(|verdict| verdict.graded),
                "answers": scored.answers,
            })
            .to_string()
        })
        .collect();
    let out = context.out();
    files::write_text(&out.join(ANSWERS_FILE), &(lines.join("\n") + "\n")).or_io(|| "write the answers")?;
    files::write_json(&out.join(SCORES_FILE), &table).or_io(|| "write the scores")?;
    context.emitter.progress(records.len() as u64, records.len() as u64, "images");
    let metrics: BTreeMap<String, f64> = table.metrics().into_iter().collect();
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

fn read_records(folder: &Path) -> JobResult<Vec<ImageRecord>> {
    let path = folder.join(IMAGES_FILE);
    let text = std::fs::read_to_string(&path).or_io(|| path.display())?;
    text.lines().map(|line| serde_json::from_str(line).or_input(|| path.display())).collect()
}

fn subject(folder: &Path, record: &ImageRecord) -> JobResult<Subject> {
    let open = |file: &str| -> JobResult<Arc<RgbImage>> {
        let path = folder.join(file);
        Ok(Arc::new(image::open(&path).or_io(|| path.display())?.to_rgb8()))
    };
    Ok(Subject {
        image: open(&record.file)?,
        source: record.source.as_deref().map(open).transpose()?,
        prompt: record.prompt.clone(),
        explanation: String::new(),
        checks: Vec::new(),
        expectation: record.expectation.clone(),
    })
}
