"""The homes of torch's private APIs: Dynamo, the joint graph, tracing, compilers."""
