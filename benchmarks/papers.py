"""Formula -> paper -> file and line, read off the docstrings of `algos/`.

python -m benchmarks.papers --write     # docs/papers.md; `make test` fails while it is behind the code
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALGOS = ROOT / "src" / "kinkajou" / "algos"
PAGE = ROOT / "docs" / "papers.md"
CITED = re.compile(r"((?:Prime |Ray |D')?[A-Z][\w-]+(?: Team| et al\.)?(?: and [A-Z]\w+)?),? ((?:18|19|20)\d\d)")
PAPERS = {
    "Ahmadian 2024": "Back to basics: revisiting REINFORCE-style optimization (RLOO), arXiv 2402.14740",
    "Askell 2021": "A general language assistant as a laboratory for alignment, arXiv 2112.00861",
    "Azar 2023": "A general theoretical paradigm to understand learning from human preferences (IPO), arXiv 2310.12036",
    "Bai 2022": "Training a helpful and harmless assistant with RLHF, arXiv 2204.05862",
    "Bradley and Terry 1952": "Rank analysis of incomplete block designs, Biometrika 39",
    "Chan 1979": "Updating formulae and a pairwise algorithm for computing sample variances, STAN-CS-79-773",
    "Chan 1983": "Algorithms for computing the sample variance, Am. Stat. 37",
    "Chen 2024": "Noise contrastive alignment of language models (NCA), arXiv 2402.05369",
    "Ray Chowdhury 2024": "Provably robust DPO, arXiv 2403.00409",
    "Coati 2023": "ColossalAI's Chat application, March 2023: what the commands in examples/ were written for",
    "DeepSeek-AI 2025": "DeepSeek-V3.2, arXiv 2512.02556",
    "D'Oosterlinck 2024": "Anchored preference optimization (APO), arXiv 2408.06266",
    "Ethayarajh 2024": "KTO: model alignment as prospect theoretic optimization, arXiv 2402.01306",
    "Gao 2025": "Soft adaptive policy optimization (SAPO), arXiv 2511.20347",
    "Gupta 2025": "AlphaPO: reward shape matters for LLM alignment, arXiv 2501.03884",
    "Holtzman 2020": "The curious case of neural text degeneration, arXiv 1904.09751",
    "Hong 2024": "ORPO: monolithic preference optimization without reference model, arXiv 2403.07691",
    "Hu 2024": "OpenRLHF, arXiv 2405.11143",
    "Hu 2025": "REINFORCE++, arXiv 2501.03262",
    "Ionides 2008": "Truncated importance sampling, J. Comput. Graph. Stat. 17",
    "Ji 2024": "Towards efficient exact optimization of language model alignment (EXO), arXiv 2402.00856",
    "Jung 2024": "Binary classifier optimization (BCO), arXiv 2404.04656",
    "Ling Team 2025": "Every step evolves: Ring-1T (IcePop), arXiv 2510.18855",
    "Liu 2024": "LD-DPO: length desensitization in DPO, arXiv 2409.06411",
    "Liu 2025": "Understanding R1-Zero-like training (Dr. GRPO), arXiv 2503.20783; When speed kills stability (2025)",
    "Lu 2024": "DiscoPOP: discovering preference optimization algorithms, arXiv 2406.08414",
    "Melnyk 2024": "Distributional preference alignment via optimal transport (AOT), arXiv 2406.05882",
    "Meng 2024": "SimPO, arXiv 2405.14734",
    "Liu 2023": "Statistical rejection sampling improves preference optimization (RSO), arXiv 2309.06657",
    "Maechler 2012": "Accurately computing log(1 - exp(-|a|)), R package Rmpfr",
    "MiniMax 2025": "MiniMax-M1 (CISPO), arXiv 2506.13585",
    "Mitchell 2023": "A note on DPO with noisy preferences (cDPO)",
    "Nguyen 2025": "Turning up the heat: min-p sampling for creative and coherent LLM outputs, arXiv 2407.01082",
    "Ouyang 2022": "Training language models to follow instructions with human feedback, arXiv 2203.02155",
    "Prime Intellect 2025": "INTELLECT-2, arXiv 2505.07291",
    "Rafailov 2023": "Direct preference optimization, arXiv 2305.18290",
    "Schulman 2016": "High-dimensional continuous control using generalized advantage estimation, arXiv 1506.02438",
    "Schulman 2017": "Proximal policy optimization algorithms, arXiv 1707.06347",
    "Schulman 2020": "Approximating KL divergence, joschu.net/blog/kl-approx.html",
    "Shannon 1948": "A mathematical theory of communication, Bell Syst. Tech. J. 27",
    "Shao 2024": "DeepSeekMath (GRPO), arXiv 2402.03300",
    "Sheng 2024": "HybridFlow (verl), arXiv 2409.19256",
    "Tang 2025": "On a few pitfalls in KL divergence gradient estimation for RL, arXiv 2506.09477",
    "Wang 2023": "Beyond reverse KL: f-DPO, arXiv 2309.16240",
    "Werra 2020": "TRL: transformer reinforcement learning, github.com/huggingface/trl",
    "Williams 1992": "Simple statistical gradient-following algorithms for connectionist RL, Machine Learning 8",
    "Wilson 1927": "Probable inference, the law of succession, and statistical inference, J. Am. Stat. Assoc. 22",
    "Wu 2024": "Self-play preference optimization (SPPO), arXiv 2405.00675",
    "Yao 2025": "Your efficient RL framework secretly brings you off-policy RL training (2025)",
    "Ye 2020": "Mastering complex control in MOBA games with deep RL (dual clip), arXiv 1912.09729",
    "Yu 2025": "DAPO, arXiv 2503.14476",
    "Zhao 2023": "SLiC-HF, arXiv 2305.10425",
    "Zheng 2025": "Group sequence policy optimization (GSPO), arXiv 2507.18071",
    "Zhou 2024": "WPO: weighted preference optimization, arXiv 2406.11827",
    "Ziegler 2019": "Fine-tuning language models from human preferences, arXiv 1909.08593",
}


@dataclass(frozen=True)
class Formula:
    name: str
    place: str
    line: int
    says: str
    papers: tuple[str, ...]


def formulas() -> Iterator[Formula]:
    """Every public function of `algos/` that cites a source, in order of file and line."""
    for path in sorted(ALGOS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            words = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if words and (papers := cited(words)):
                says = re.sub(r" \([A-Z][^()]*\d{4}[^()]*\)", "", " ".join(words.split()))
                says = re.split(r"(?<=\.) ", says, maxsplit=1)[0].rstrip(".:;")
                place = path.relative_to(ROOT).as_posix()
                yield Formula(node.name, place, node.lineno, says, papers)


def cited(words: str) -> tuple[str, ...]:
    """Author and year of each source, once."""
    flat = " ".join(words.split())
    return tuple(dict.fromkeys(f"{author} {year}" for author, year in CITED.findall(flat)))


def unknown() -> set[str]:
    """Sources without a title in PAPERS."""
    return {paper for formula in formulas() for paper in formula.papers} - set(PAPERS)


def page() -> str:
    lines = [
        "# Formula, paper, line",
        "",
        "Written from the docstrings by `python -m benchmarks.papers --write`; a test holds it to the code. What each",
        "framework makes of these formulas is in [numerics.md](numerics.md).",
        "",
        "| formula | what it is | source | where |",
        "|---|---|---|---|",
    ]
    used: dict[str, str] = {}
    for formula in formulas():
        used |= {paper: PAPERS[paper] for paper in formula.papers}
        where = f"[{formula.place.removeprefix('src/kinkajou/')}:{formula.line}](../{formula.place}#L{formula.line})"
        says = formula.says.replace("|", "\\|")
        lines.append(f"| `{formula.name}` | {says} | {', '.join(formula.papers)} | {where} |")
    lines += ["", "## Sources", "", "| cited as | title |", "|---|---|"]
    lines += [f"| {paper} | {title} |" for paper, title in sorted(used.items())]
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> None:
    text = page()
    if "--write" in arguments:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
