//! Images side by side: a row for each prompt, a column for each checkpoint, edits with their source first.
//!
//! Knows the look; which prompts are shown was decided when they were read.

use super::data::{Mark, Picture, ReportData, SampleCell, SampleGrid};
use super::markup::{Markup, Table, anchor, data_url, el};

/// Images no wider than this are enlarged without smoothing, so that each pixel is seen.
const MAX_PIXELATED: usize = 128;

/// Returns the grids; nothing when no node drew images.
pub fn section(data: &ReportData) -> Option<Markup> {
    let grids: Vec<Markup> = data.grids.iter().filter(|grid| !grid.rows.is_empty()).map(grid).collect();
    (!grids.is_empty()).then(|| Markup::join(grids))
}

fn grid(grid: &SampleGrid) -> Markup {
    let is_edit = grid.rows.iter().any(|row| row.source.is_some());
    let has_marks = grid.rows.iter().flat_map(|row| row.cells.iter().flatten()).any(|cell| cell.mark.is_some());
    let mut columns = vec![Markup::text(if is_edit { "Instruction" } else { "Prompt" })];
    if is_edit {
        columns.push(Markup::text("Source"));
    }
    for column in &grid.columns {
        let link = el("a").attr("href", format!("#{}", anchor("node", &column.node.0))).text(&column.label);
        columns.push(link.into());
    }
    let marks = if has_marks { ", each with the judge's verdict" } else { "" };
    let copies = format!(
        "{} of {} prompts, spread evenly over the tags, first image of each{marks}",
        grid.rows.len(),
        grid.num_items
    );
    let mut table = Table::new("samples", columns).caption(copies);
    for row in &grid.rows {
        let prompt = el("div").class("prompt").text(&row.prompt);
        let name = Markup::join([prompt, el("span").class("tag").text(&row.tag)]);
        let source =
            row.source.as_ref().map(|source| Markup::from(image(source, &format!("source image: {}", row.prompt))));
        let source = is_edit.then(|| source.unwrap_or_default());
        let cells = row.cells.iter().zip(&grid.columns).map(|(cell, column)| match cell {
            Some(cell) => sample(cell, &row.prompt, &column.label),
            None => el("span").class("muted").text("missing").into(),
        });
        table.row(name, source.into_iter().chain(cells));
    }
    let heading = el("h3").attr("id", anchor("samples", &grid.benchmark)).text(&grid.benchmark);
    Markup::join([heading.into(), Markup::from(table)])
}

fn sample(cell: &SampleCell, prompt: &str, checkpoint: &str) -> Markup {
    let verdict = match cell.mark {
        Some(Mark { strict: true, .. }) => ", judged right",
        Some(Mark { strict: false, .. }) => ", judged wrong",
        None => "",
    };
    let image = image(&cell.picture, &format!("{checkpoint}: {prompt}{verdict}"));
    let frame = match cell.mark {
        Some(mark) => el("div").class(if mark.strict { "sample right" } else { "sample wrong" }),
        None => el("div").class("sample"),
    };
    let mark = cell.mark.map(|mark| {
        let sign = if mark.strict { "\u{2713}" } else { "\u{2715}" };
        let graded = mark.graded.filter(|_| !mark.strict).map_or(String::new(), |graded| format!(" {graded:.2}"));
        el("span").class("mark").attr("aria-hidden", "true").text(format!("{sign}{graded}"))
    });
    frame.add(image).add_all(mark).into()
}

fn image(picture: &Picture, alt: &str) -> super::markup::Element {
    let is_small = picture.size.is_none_or(|(width, _)| width <= MAX_PIXELATED);
    let image = el("img").attr("src", data_url(picture.mime, &picture.bytes)).attr("alt", alt).attr("loading", "lazy");
    image.class(if is_small { "pixelated" } else { "smooth" })
}
