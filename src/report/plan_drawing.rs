//! The graph of a plan as a stand-alone SVG: the report's drawing, coloured by verdict.
//!
//! Knows plans; how boxes look and where they stand is the report's.

use std::collections::BTreeMap;

use deepgen_contract::id::NodeName;

use super::dag::{FACT_CHARS, Vertex, drawing, name_lines, shortened};
use super::markup::{Markup, el};
use crate::plan::{Plan, PlannedNode, Verdict};

/// Colours and fonts: a file of its own has no page around it.
const STYLE: &str = "
  svg { color-scheme: light dark; background: light-dark(#fcfbf9, #14171b); }
  .edge { fill: none; stroke: light-dark(#cfcac0, #4a525c); stroke-width: 1.4; }
  .edge.dead { stroke-dasharray: 3 4; }
  text { font: 540 12px system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; fill: light-dark(#1d2228, #e6e8ea); }
  .facts { font-size: 11px; font-weight: 400; fill: light-dark(#5b6470, #9ea7b1); }
  rect { stroke: light-dark(#e4e1db, #2d333a); }
  rect.bar { stroke: none; }
  .ran rect { fill: light-dark(#e7f3ec, #1b2d24); } .ran .bar, .ran .sign { fill: light-dark(#1f7a4d, #6fcf9c); }
  .cached rect { fill: light-dark(#ebf0f6, #202a35); } .cached .bar, .cached .sign { fill: light-dark(#4d6a8a, #a3bedb); }
  .blocked rect { fill: light-dark(#faf0dd, #332a19); stroke-dasharray: 4 3; }
  .blocked .bar, .blocked .sign { fill: light-dark(#8a5a00, #e9b965); }
";

/// Returns the graph of a plan as an SVG document.
pub fn svg(plan: &Plan) -> String {
    let index: BTreeMap<&NodeName, usize> = plan.nodes.iter().enumerate().map(|(at, p)| (&p.node.name, at)).collect();
    let vertex = |planned: &PlannedNode| {
        let node = &planned.node;
        let (class, sign, reason) = match &planned.verdict {
            Verdict::Cached => ("cached", "\u{21ba}", String::new()),
            Verdict::Run(reason) => ("ran", "\u{25b6}", format!(": {reason}")),
            Verdict::Blocked(missing) => {
                let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
                ("blocked", "\u{2298}", format!(": {}", missing.join(", ")))
            }
        };
        let mut lines = name_lines(&node.name.0);
        lines.push(shortened(&format!("{} \u{00b7} {}", planned.verdict, node.stage), FACT_CHARS));
        Vertex {
            lines,
            class,
            sign,
            title: format!("{}, stage {}, {}{reason}", node.name, node.stage, planned.verdict),
            href: None,
            sources: node.inputs.values().filter_map(|input| index.get(input).copied()).collect(),
            is_done: planned.verdict == Verdict::Cached,
        }
    };
    let drawing = drawing(&plan.nodes.iter().map(vertex).collect::<Vec<_>>());
    let svg = drawing.attr("xmlns", "http://www.w3.org/2000/svg").add(el("style").add(Markup::raw(STYLE)));
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}", Markup::from(svg))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{plan_of_full, with_name};

    #[test]
    fn a_drawing_stands_by_itself_and_holds_every_node() {
        let plan = with_name(plan_of_full(), "<a> & \"b\"");
        let svg = svg(&plan);
        assert!(svg.starts_with("<?xml") && svg.contains("xmlns=\"http://www.w3.org/2000/svg\""));
        assert_eq!(svg.matches("class=\"box\"").count(), plan.nodes.len());
        assert!(svg.contains("&lt;a&gt; &amp; ") && !svg.contains("<a>"));
        if let Ok(folder) = std::env::var("DEEPGEN_REPORT_OUT") {
            std::fs::write(format!("{folder}/plan.svg"), &svg).unwrap();
        }
    }
}
